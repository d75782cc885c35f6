// Matrix products, written once for all levels: S is the level's sixteen-lane arithmetic.
//
// A tile is 16 rows times up to S::kTokens tokens. Quantised weights are multiplied as integers within a weight
// scale's span, exactly; the spans are added in float in order of columns. So the few tokens of a decode step and
// the many of a prompt get the same bits, whichever function computes them.
#pragma once

#include <type_traits>

#include "math.hpp"

namespace {

using localmoe::Format;
using localmoe::is_quantized;
using localmoe::kBlock;
using localmoe::kRowGroup;
using localmoe::Matrix;
using localmoe::Output;
using localmoe::Tokens;

// Far enough ahead that DRAM answers in time, and over page ends, where the hardware's own prefetching stops.
constexpr size_t kPrefetchBytes = 4096;

template <size_t bytes>
inline void prefetch(const uint8_t* p) {
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes + i), _MM_HINT_T0);
}

// How a format's bytes become vectors of unsigned weights: `decode` gives columns 8j..8j+3 and 8j+4..8j+7 of a
// block, `scale` the factors of span p of block b.

template <class S>
struct Mxfp4 {
    static constexpr size_t kSpans = 1, kBlockBytes = 256;
    static typename S::I dot(typename S::I sum, typename S::B first, typename S::I first_input,
                             typename S::B second, typename S::I second_input) {
        return S::dot_small(sum, first, first_input, second, second_input);
    }
    static void decode(const uint8_t* block, size_t j, typename S::B& first, typename S::B& second) {
        const auto codes = S::load_bytes(block + 64 * j);
        first = S::e2m1_low(codes);
        second = S::e2m1_high(codes);
    }
    // E8M0 is a float's exponent; the smallest, 2^-127, is subnormal and needs its own bits.
    static typename S::F scale(const uint8_t* scales, size_t b, size_t) {
        const auto exponents = S::template shift_left<23>(S::from_bytes(scales + 16 * b));
        return S::as_float(S::max_unsigned(exponents, S::set1_int(0x00400000)));
    }
};

template <class S>
struct Nvfp4 : Mxfp4<S> {
    static constexpr size_t kSpans = 2;
    static typename S::F scale(const uint8_t* scales, size_t b, size_t p) {
        return S::from_e4m3_over_256(scales + 32 * b + 16 * p);
    }
};

template <class S>
struct Int8 {
    static constexpr size_t kSpans = 1, kBlockBytes = 512;
    static typename S::I dot(typename S::I sum, typename S::B first, typename S::I first_input,
                             typename S::B second, typename S::I second_input) {
        return S::dot_wide(sum, first, first_input, second, second_input);
    }
    static void decode(const uint8_t* block, size_t j, typename S::B& first, typename S::B& second) {
        first = S::load_bytes(block + 128 * j);
        second = S::load_bytes(block + 128 * j + 64);
    }
    static typename S::F scale(const uint8_t* scales, size_t b, size_t) { return S::from_half(scales + 32 * b); }
};

// FP4 that `expand` has decoded already, for tiles; float scales.
template <class S, size_t spans>
struct Expanded : Int8<S> {
    static constexpr size_t kSpans = spans;
    static typename S::I dot(typename S::I sum, typename S::B first, typename S::I first_input,
                             typename S::B second, typename S::I second_input) {
        return S::dot_small(sum, first, first_input, second, second_input);
    }
    static typename S::F scale(const uint8_t* scales, size_t b, size_t p) {
        return S::load(reinterpret_cast<const float*>(scales) + 16 * (spans * b + p));
    }
};

template <class S, class W>
void expand(const uint8_t* values, const uint8_t* scales, size_t num_blocks, uint8_t* expanded_values,
            float* expanded_scales) {
    for (size_t b = 0; b < num_blocks; ++b) {
        prefetch<W::kBlockBytes>(values + b * W::kBlockBytes);
        for (size_t j = 0; j < 4; ++j) {
            typename S::B first, second;
            W::decode(values + b * W::kBlockBytes, j, first, second);
            S::store_bytes(expanded_values + b * 512 + 128 * j, first);
            S::store_bytes(expanded_values + b * 512 + 128 * j + 64, second);
        }
        for (size_t p = 0; p < W::kSpans; ++p) {
            S::store(expanded_scales + 16 * (W::kSpans * b + p), W::scale(scales, b, p));
        }
    }
}

// One row group of quantised weights times one token group: tile[t * 16 + row].
template <class S, class W, int n>
inline void quantized_tile(const uint8_t* values, const uint8_t* scales, size_t num_blocks, const int32_t* codes,
                           const float* token_scales, const int32_t* bias, float* tile) {
    using F = typename S::F;
    using I = typename S::I;
    F sums[n];
    for (int t = 0; t < n; ++t) sums[t] = S::zero();
    for (size_t b = 0; b < num_blocks; ++b) {
        const uint8_t* block = values + b * W::kBlockBytes;
        prefetch<W::kBlockBytes>(block);
        F scaled[n];
#pragma GCC unroll 2
        for (size_t p = 0; p < W::kSpans; ++p) {
            I dots[n];
            for (int t = 0; t < n; ++t) dots[t] = S::set1_int(bias[t]);
            bias += n;
#pragma GCC unroll 4
            for (size_t j = 4 / W::kSpans * p; j < 4 / W::kSpans * (p + 1); ++j) {
                typename S::B first, second;
                W::decode(block, j, first, second);
#pragma GCC unroll 16
                for (int t = 0; t < n; ++t) {
                    dots[t] = W::dot(dots[t], first, S::set1_int(codes[t]), second, S::set1_int(codes[n + t]));
                }
                codes += 2 * n;
            }
            const F scale = W::scale(scales, b, p);
#pragma GCC unroll 16
            for (int t = 0; t < n; ++t) {
                const F dot = S::to_float(dots[t]);
                scaled[t] = p == 0 ? S::mul(dot, scale) : S::fma(dot, scale, scaled[t]);
            }
        }
#pragma GCC unroll 16
        for (int t = 0; t < n; ++t) sums[t] = S::fma(scaled[t], S::set1(token_scales[t]), sums[t]);
        token_scales += n;
    }
    for (int t = 0; t < n; ++t) S::store(tile + 16 * t, sums[t]);
}

// The same for a level with tiles and tokens packed row-major: S multiplies a block of 32 columns at once.
template <class S, class W, int n>
inline void matrix_tile(const uint8_t* values, const uint8_t* scales, size_t num_blocks, const int32_t* codes,
                        const float* token_scales, const int32_t* bias, float* tile) {
    using F = typename S::F;
    F sums[n];
    for (int t = 0; t < n; ++t) sums[t] = S::zero();
    for (size_t b = 0; b < num_blocks; ++b) {
        F scaled[n];
#pragma GCC unroll 2
        for (size_t p = 0; p < W::kSpans; ++p) {
            constexpr size_t words = 8 / W::kSpans;
            alignas(64) int32_t dots[16 * 16];
            S::template multiply<words>(codes + 8 * b + words * p, num_blocks * 32,
                                        values + 512 * b + 64 * words * p, dots);
            const F scale = W::scale(scales, b, p);
#pragma GCC unroll 16
            for (int t = 0; t < n; ++t) {
                const auto sum = S::load_bytes(reinterpret_cast<const uint8_t*>(dots + 16 * t));
                const F dot = S::to_float(S::add_int(sum, S::set1_int(bias[t])));
                scaled[t] = p == 0 ? S::mul(dot, scale) : S::fma(dot, scale, scaled[t]);
            }
            bias += n;
        }
#pragma GCC unroll 16
        for (int t = 0; t < n; ++t) sums[t] = S::fma(scaled[t], S::set1(token_scales[t]), sums[t]);
        token_scales += n;
    }
    for (int t = 0; t < n; ++t) S::store(tile + 16 * t, sums[t]);
}

// `groups` neighbouring row groups at once, so that a lone token has enough independent sums to keep the adders
// busy: tile[(group * n + t) * 16 + row].
template <class S, bool bf16, int groups, int n>
inline void float_tile(const uint8_t* values, size_t group_bytes, size_t columns, const float* inputs,
                       float* tile) {
    using F = typename S::F;
    F sums[groups][n];
    for (auto& row : sums) {
        for (auto& sum : row) sum = S::zero();
    }
    for (size_t c = 0; c < columns; c += bf16 ? 2 : 1) {
#pragma GCC unroll 4
        for (int g = 0; g < groups; ++g) {
            const uint8_t* place = values + g * group_bytes + c * (bf16 ? 32 : 64);
            prefetch<64>(place);
            if constexpr (bf16) {
                const auto pairs = S::load_bytes(place);
                const F even = S::even_bf16(pairs), odd = S::odd_bf16(pairs);
#pragma GCC unroll 16
                for (int t = 0; t < n; ++t) {
                    sums[g][t] = S::fma(even, S::set1(inputs[t]), sums[g][t]);
                    sums[g][t] = S::fma(odd, S::set1(inputs[n + t]), sums[g][t]);
                }
            } else {
                const F weights = S::load(reinterpret_cast<const float*>(place));
#pragma GCC unroll 16
                for (int t = 0; t < n; ++t) sums[g][t] = S::fma(weights, S::set1(inputs[t]), sums[g][t]);
            }
        }
        inputs += bf16 ? 2 * n : n;
    }
    for (int g = 0; g < groups; ++g) {
        for (int t = 0; t < n; ++t) S::store(tile + (g * n + t) * 16, sums[g][t]);
    }
}

// Calls function(std::integral_constant<int, n>) for the n of 1..most that is asked for.
template <int most, class Function>
inline void with_constant(int n, Function&& function) {
    if constexpr (most > 0) {
        if (n == most) {
            function(std::integral_constant<int, most>{});
        } else {
            with_constant<most - 1>(n, function);
        }
    }
}

template <class S>
inline void emit(const float* tile, int n, size_t rows, float factor, Output output) {
    for (int t = 0; t < n; ++t) {
        float* out = output.out + t * output.stride;
        auto sums = S::mul(S::load(tile + 16 * t), S::set1(factor));
        if (rows >= kRowGroup) {
            S::store(out, output.add ? S::add(S::load(out), sums) : sums);
        } else {
            const int count = static_cast<int>(rows);
            S::store_first(out, output.add ? S::add(S::load_first(out, count), sums) : sums, count);
        }
    }
}

// What turns a tile's sums into the product: FP4 codes are doubled, and E4M3 scales come over 256.
inline float tile_factor(const Matrix& matrix) {
    switch (matrix.format) {
        case Format::kMxfp4:
            return 0.5f;
        case Format::kNvfp4:
            return 128.0f * matrix.tensor_scale;
        default:
            return 1.0f;
    }
}

// One row group against all tokens, tile by tile: function(tile, n, first token).
template <class S, class W, class Function>
inline void quantized_group(const uint8_t* values, const uint8_t* scales, const Tokens& tokens,
                            Function&& function) {
    const size_t num_blocks = tokens.columns / kBlock;
    for (size_t first = 0; first < tokens.count; first += S::kTokens) {
        const int n = static_cast<int>(tokens.count - first < S::kTokens ? tokens.count - first : S::kTokens);
        alignas(64) float tile[16 * S::kTokens];
        const int32_t* codes = tokens.codes + first * num_blocks * 8;
        const float* token_scales = tokens.scales + first * num_blocks;
        const int32_t* bias = tokens.bias + first * num_blocks * W::kSpans;
        with_constant<S::kTokens>(n, [&](auto count) {
            if constexpr (S::kTileTokens != 0 && W::kBlockBytes == 512 && count >= S::kTileTokens) {
                matrix_tile<S, W, count>(values, scales, num_blocks, codes, token_scales, bias, tile);
            } else {
                quantized_tile<S, W, count>(values, scales, num_blocks, codes, token_scales, bias, tile);
            }
        });
        function(tile, n, first);
    }
}

// FP4 codes are looked up anew for every token group, which hides behind the products; but tiles are loaded from
// memory, so for them a row group is decoded into the cache first.
template <class S, class W, class Function>
inline void fp4_group(const uint8_t* values, const uint8_t* scales, const Tokens& tokens, uint8_t* scratch,
                      Function&& function) {
    if constexpr (S::kTileTokens != 0) {
        if (tokens.count >= S::kTileTokens) {
            auto* expanded_scales = reinterpret_cast<float*>(scratch + tokens.columns * 16);
            expand<S, W>(values, scales, tokens.columns / kBlock, scratch, expanded_scales);
            quantized_group<S, Expanded<S, W::kSpans>>(scratch, reinterpret_cast<uint8_t*>(expanded_scales),
                                                       tokens, function);
            return;
        }
    }
    quantized_group<S, W>(values, scales, tokens, function);
}

// Row groups [first_group, last_group) of quantised weights against all tokens: function(tile, n, first token,
// group).
template <class S, class Function>
inline void quantized_groups(const Matrix& matrix, size_t first_group, size_t last_group, const Tokens& tokens,
                             uint8_t* scratch, Function&& function) {
    for (size_t group = first_group; group < last_group; ++group) {
        const uint8_t* values = matrix.values + group * matrix.group_values_bytes();
        const uint8_t* scales = matrix.scales + group * matrix.group_scales_bytes();
        const auto emit = [&](const float* tile, int n, size_t first) { function(tile, n, first, group); };
        switch (matrix.format) {
            case Format::kMxfp4:
                fp4_group<S, Mxfp4<S>>(values, scales, tokens, scratch, emit);
                break;
            case Format::kNvfp4:
                fp4_group<S, Nvfp4<S>>(values, scales, tokens, scratch, emit);
                break;
            default:
                quantized_group<S, Int8<S>>(values, scales, tokens, emit);
        }
    }
}

// Row groups [first_group, last_group) of float weights against all tokens: function(tile, n, first token, group).
template <class S, bool bf16, class Function>
inline void float_groups(const Matrix& matrix, size_t first_group, size_t last_group, const Tokens& tokens,
                         Function&& function) {
    constexpr size_t kTogether = 4;
    const size_t group_bytes = matrix.group_values_bytes();
    const size_t columns = bf16 ? (matrix.columns + 1) / 2 * 2 : matrix.columns;
    for (size_t group = first_group; group < last_group;) {
        const size_t together = tokens.count == 1 && last_group - group >= kTogether ? kTogether : 1;
        for (size_t first = 0; first < tokens.count; first += S::kTokens) {
            const int n = static_cast<int>(tokens.count - first < S::kTokens ? tokens.count - first : S::kTokens);
            const uint8_t* values = matrix.values + group * group_bytes;
            const float* inputs = tokens.values + first * columns;
            alignas(64) float tile[16 * (S::kTokens > kTogether ? S::kTokens : kTogether)];
            if (together == kTogether) {
                float_tile<S, bf16, kTogether, 1>(values, group_bytes, columns, inputs, tile);
            } else {
                with_constant<S::kTokens>(n, [&](auto count) {
                    float_tile<S, bf16, 1, count>(values, group_bytes, columns, inputs, tile);
                });
            }
            for (size_t g = 0; g < together; ++g) function(tile + 16 * g, n, first, group + g);
        }
        group += together;
    }
}

// All tiles of some row groups, whatever the format: function(tile, n, first token, group).
template <class S, class Function>
inline void for_each_tile(const Matrix& matrix, size_t first_group, size_t last_group, const Tokens& tokens,
                          uint8_t* scratch, Function&& function) {
    if (matrix.format == Format::kBf16) {
        float_groups<S, true>(matrix, first_group, last_group, tokens, function);
    } else if (matrix.format == Format::kF32) {
        float_groups<S, false>(matrix, first_group, last_group, tokens, function);
    } else {
        quantized_groups<S>(matrix, first_group, last_group, tokens, scratch, function);
    }
}

template <class S>
void product(const Matrix& matrix, size_t first_group, size_t last_group, const Tokens& tokens, Output output,
             uint8_t* scratch) {
    const float factor = tile_factor(matrix);
    for_each_tile<S>(matrix, first_group, last_group, tokens, scratch,
                     [&](const float* tile, int n, size_t first, size_t group) {
                         float* out = output.out + first * output.stride + group * kRowGroup;
                         emit<S>(tile, n, matrix.rows - group * kRowGroup, factor,
                                 {out, output.stride, output.add});
                     });
}

// The gate's rows wait in the output until up's come.
template <class S>
void gate_up(const Matrix& gate, const Matrix& up, size_t first_group, size_t last_group, const Tokens& tokens,
             Output output, uint8_t* scratch) {
    const float gate_factor = tile_factor(gate), up_factor = tile_factor(up);
    for_each_tile<S>(gate, first_group, last_group, tokens, scratch,
                     [&](const float* tile, int n, size_t first, size_t group) {
                         float* out = output.out + first * output.stride + group * kRowGroup;
                         emit<S>(tile, n, kRowGroup, gate_factor, {out, output.stride, false});
                     });
    for_each_tile<S>(
        up, first_group, last_group, tokens, scratch, [&](const float* tile, int n, size_t first, size_t group) {
            for (int t = 0; t < n; ++t) {
                float* out = output.out + (first + static_cast<size_t>(t)) * output.stride + group * kRowGroup;
                const auto x = S::load(out);
                const auto up_x = S::mul(S::load(tile + 16 * t), S::set1(up_factor));
                const auto silu = S::div(x, S::add(S::set1(1.0f), exp<S>(S::sub(S::zero(), x))));
                S::store(out, S::mul(silu, up_x));
            }
        });
}

}  // namespace
