// Paged attention (Kwon et al., 2023) with the running softmax of Milakov & Gimelshein (2018), written once for
// all levels.
//
// Keys lie transposed in their block, so that sixteen neighbouring tokens are the lanes of a vector and scores
// need no sum across lanes. Rows of a tile share what is loaded; each row's arithmetic depends on its own query
// and position only. Whatever lies in the cache beyond a row's position is never added in.
#pragma once

#include <type_traits>

#include "math.hpp"

namespace {

using localmoe::Cache;
using localmoe::kAttendTokens;
using localmoe::QueryTile;

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline void write_kv(const Cache& cache, const float* key, const float* value, int64_t slot) {
    const size_t d = cache.head_dim, B = cache.block_tokens;
    const size_t block = static_cast<size_t>(slot) / B, offset = static_cast<size_t>(slot) % B;
    for (size_t g = 0; g < cache.num_kv_heads; ++g) {
        const size_t head = (block * cache.num_kv_heads + g) * d * B;
        if (cache.bf16) {
            auto* keys = reinterpret_cast<uint16_t*>(cache.keys) + head + offset;
            auto* values = reinterpret_cast<uint16_t*>(cache.values) + head + offset * d;
            for (size_t i = 0; i < d; ++i) keys[i * B] = to_bf16(key[g * d + i]);
            for (size_t i = 0; i < d; ++i) values[i] = to_bf16(value[g * d + i]);
        } else {
            auto* keys = reinterpret_cast<float*>(cache.keys) + head + offset;
            auto* values = reinterpret_cast<float*>(cache.values) + head + offset * d;
            for (size_t i = 0; i < d; ++i) keys[i * B] = key[g * d + i];
            for (size_t i = 0; i < d; ++i) values[i] = value[g * d + i];
        }
    }
}

template <class S>
inline typename S::F load_kv(const float* p, int) {
    return S::load(p);
}
template <class S>
inline typename S::F load_kv(const uint16_t* p, int) {
    return S::as_float(S::template shift_left<16>(S::from_words(p)));
}

template <class S, class T, int rows>
void attend_rows(const Cache& cache, const QueryTile& tile, float* scratch) {
    using F = typename S::F;
    const size_t d = cache.head_dim, B = cache.block_tokens;
    float* queries = scratch;          // [d][rows]
    float* sums = queries + d * rows;  // [rows][d rounded up to 16]
    const size_t width = (d + 15) / 16 * 16;
    float* scores = sums + rows * width;            // [rows][kAttendTokens]
    float* shares = scores + rows * kAttendTokens;  // [kAttendTokens][rows]
    float largest[rows], totals[rows];
    size_t visible[rows];
    const size_t num_rows = tile.num_tokens * tile.num_heads;
    const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(d));
    for (size_t row = 0; row < rows; ++row) {
        const size_t r = row < num_rows ? row : 0;  // unused rows repeat the first
        const float* q = tile.q + r / tile.num_heads * tile.stride + r % tile.num_heads * d;
        for (size_t i = 0; i < d; ++i) queries[i * rows + row] = q[i] * factor;
        visible[row] = tile.first_position + r / tile.num_heads + 1;
        largest[row] = -__builtin_inff();
        totals[row] = 0.0f;
    }
    for (size_t i = 0; i < rows * width; ++i) sums[i] = 0.0f;
    const size_t length = tile.first_position + tile.num_tokens;
    const T* all_keys = reinterpret_cast<const T*>(cache.keys);
    const T* all_values = reinterpret_cast<const T*>(cache.values);
    const size_t head_size = d * B, block_size = cache.num_kv_heads * head_size;

    for (size_t start = 0; start < length; start += kAttendTokens) {
        const size_t count = length - start < kAttendTokens ? length - start : kAttendTokens;
        for (size_t t = 0; t < count; t += 16) {
            const size_t block = static_cast<size_t>(tile.block_table[(start + t) / B]);
            const T* keys = all_keys + block * block_size + tile.kv_head * head_size + (start + t) % B;
            F dots[rows];
            for (auto& dot : dots) dot = S::zero();
            for (size_t i = 0; i < d; ++i) {
                const F key = load_kv<S>(keys + i * B, 16);
#pragma GCC unroll 8
                for (int row = 0; row < rows; ++row)
                    dots[row] = S::fma(key, S::set1(queries[i * rows + row]), dots[row]);
            }
            for (int row = 0; row < rows; ++row) S::store(scores + row * kAttendTokens + t, dots[row]);
        }
        for (int row = 0; row < rows; ++row) {
            const size_t seen = visible[row] <= start          ? 0
                                : visible[row] - start < count ? visible[row] - start
                                                               : count;
            float* row_scores = scores + row * kAttendTokens;
            const F nothing = S::set1(-__builtin_inff());
            F most = S::set1(largest[row]);
            for (size_t t = 0; t < seen; t += 16) {
                const int n = seen - t < 16 ? static_cast<int>(seen - t) : 16;
                most = S::max(most, S::first(S::load(row_scores + t), nothing, n));
            }
            const float now = max_lanes<S>(most);
            F total = S::zero();
            for (size_t t = 0; t < seen; t += 16) {
                const int n = seen - t < 16 ? static_cast<int>(seen - t) : 16;
                const F e = S::first(exp<S>(S::sub(S::load(row_scores + t), S::set1(now))), S::zero(), n);
                S::store(row_scores + t, e);
                total = S::add(total, e);
            }
            if (seen > 0) {
                const float kept = largest[row] == -__builtin_inff() ? 0.0f : __builtin_expf(largest[row] - now);
                if (kept != 1.0f) {
                    for (size_t i = 0; i < width; i += 16) {
                        S::store(sums + row * width + i, S::mul(S::load(sums + row * width + i), S::set1(kept)));
                    }
                }
                totals[row] = totals[row] * kept + sum_lanes<S>(total);
                largest[row] = now;
            }
            for (size_t t = 0; t < count; ++t) shares[t * rows + row] = t < seen ? row_scores[t] : 0.0f;
        }
        const T* places[kAttendTokens];
        for (size_t t = 0; t < count; ++t) {
            const size_t block = static_cast<size_t>(tile.block_table[(start + t) / B]);
            places[t] = all_values + block * block_size + tile.kv_head * head_size + (start + t) % B * d;
        }
        // Past the first row's last key, only the rows that see a value add it: zero times NaN would be NaN.
        const size_t shared = visible[0] <= start ? 0 : visible[0] - start < count ? visible[0] - start : count;
        for (size_t i = 0; i < d; i += 16) {
            F parts[rows];
            for (int row = 0; row < rows; ++row) parts[row] = S::load(sums + row * width + i);
            const int lanes = d - i < 16 ? static_cast<int>(d - i) : 16;
            for (size_t t = 0; t < count; ++t) {
                const T* place = places[t] + i;
                F value;
                if (lanes == 16) {
                    value = load_kv<S>(place, 16);
                } else {
                    alignas(64) T padded[16] = {};
                    for (int lane = 0; lane < lanes; ++lane) padded[lane] = place[lane];
                    value = load_kv<S>(padded, 16);
                }
                if (t < shared) {
#pragma GCC unroll 8
                    for (int row = 0; row < rows; ++row) {
                        parts[row] = S::fma(value, S::set1(shares[t * rows + row]), parts[row]);
                    }
                } else {
                    for (int row = 0; row < rows; ++row) {
                        if (start + t < visible[row]) {
                            parts[row] = S::fma(value, S::set1(shares[t * rows + row]), parts[row]);
                        }
                    }
                }
            }
            for (int row = 0; row < rows; ++row) S::store(sums + row * width + i, parts[row]);
        }
    }
    for (size_t row = 0; row < num_rows; ++row) {
        float* out = tile.out + row / tile.num_heads * tile.stride + row % tile.num_heads * d;
        const float inverse = 1.0f / totals[row];
        for (size_t i = 0; i < d; ++i) out[i] = sums[row * width + i] * inverse;
    }
}

template <class S>
void attend(const Cache& cache, const QueryTile& tile, float* scratch) {
    const size_t rows = tile.num_tokens * tile.num_heads;
    const auto run = [&](auto constant) {
        cache.bf16 ? attend_rows<S, uint16_t, constant>(cache, tile, scratch)
                   : attend_rows<S, float, constant>(cache, tile, scratch);
    };
    if (rows == 1) return run(std::integral_constant<int, 1>{});
    if (rows <= 2) return run(std::integral_constant<int, 2>{});
    if (rows <= 4) return run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 8>{});
}

}  // namespace
