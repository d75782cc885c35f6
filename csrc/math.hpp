// Elementwise arithmetic and reductions, written once for all levels.
#pragma once

#include <immintrin.h>

#include "kernels.hpp"

namespace {

// Within 2 units in the last place; arguments are clamped to where the result is a normal float, NaN stays NaN.
// Cody-Waite reduction and a polynomial of degree 6 (Cephes).
template <class S>
inline typename S::F exp(typename S::F x) {
    using F = typename S::F;
    x = S::min(S::set1(88.0f), S::max(S::set1(-87.0f), x));
    const F n = S::round(S::mul(x, S::set1(1.44269504088896341f)));
    F r = S::fma(n, S::set1(-0.693359375f), x);
    r = S::fma(n, S::set1(2.12194440e-4f), r);
    F y = S::set1(1.9875691500e-4f);
    y = S::fma(y, r, S::set1(1.3981999507e-3f));
    y = S::fma(y, r, S::set1(8.3334519073e-3f));
    y = S::fma(y, r, S::set1(4.1665795894e-2f));
    y = S::fma(y, r, S::set1(1.6666665459e-1f));
    y = S::fma(y, r, S::set1(5.0000001201e-1f));
    y = S::fma(S::mul(r, r), y, S::add(r, S::set1(1.0f)));
    const F power = S::as_float(S::template shift_left<23>(S::add_int(S::to_int(n), S::set1_int(127))));
    return S::mul(y, power);
}

// Halves are added pairwise, in the same order in every level.
template <class S>
inline float sum_lanes(typename S::F x) {
    const __m256 eight = _mm256_add_ps(S::low(x), S::high(x));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

template <class S>
inline float max_lanes(typename S::F x) {
    const __m256 eight = _mm256_max_ps(S::low(x), S::high(x));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// Sums and maxima of integers are exact in any order.
template <class S>
inline int32_t sum_lanes_int(typename S::I x) {
    const __m256i eight = _mm256_add_epi32(_mm256_castps_si256(S::low(S::as_float(x))),
                                           _mm256_castps_si256(S::high(S::as_float(x))));
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

template <class S>
inline uint32_t max_lanes_unsigned(typename S::I x) {
    const __m256i eight = _mm256_max_epu32(_mm256_castps_si256(S::low(S::as_float(x))),
                                           _mm256_castps_si256(S::high(S::as_float(x))));
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xB1))));
}

template <class S>
void quantize(const float* x, size_t columns, localmoe::Format weights, int8_t* codes, float* scales,
              int32_t* bias) {
    const size_t spans = localmoe::spans_per_block(weights);
    const int32_t offset = weights == localmoe::Format::kInt8 ? S::kWideOffset : localmoe::weight_offset(weights);
    for (size_t b = 0; b < columns / localmoe::kBlock; ++b) {
        const auto first = S::load(x + 32 * b), second = S::load(x + 32 * b + 16);
        // As integers, magnitudes are in the order of their values, with infinity and NaN above all.
        const uint32_t bits = max_lanes_unsigned<S>(S::max_unsigned(S::magnitude(first), S::magnitude(second)));
        const bool finite = bits < 0x7F800000;
        float largest;
        __builtin_memcpy(&largest, &bits, 4);
        const float inverse = finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
        const auto factor = S::set1(inverse);
        const bool zero = inverse == 0.0f;
        const auto q0 = zero ? S::set1_int(0) : S::to_int(S::mul(first, factor));
        const auto q1 = zero ? S::set1_int(0) : S::to_int(S::mul(second, factor));
        S::store_bytes(codes + 32 * b, q0);
        S::store_bytes(codes + 32 * b + 16, q1);
        scales[b] = finite ? (zero ? 0.0f : largest / 127.0f) : __builtin_nanf("");
        if (spans == 2) {
            bias[2 * b] = -offset * sum_lanes_int<S>(q0);
            bias[2 * b + 1] = -offset * sum_lanes_int<S>(q1);
        } else {
            bias[b] = -offset * sum_lanes_int<S>(S::add_int(q0, q1));
        }
    }
}

template <class S>
void rms_norm(const float* x, const float* weight, size_t size, float eps, float* h) {
    auto squares = S::zero();
    size_t i = 0;
    for (; i + 16 <= size; i += 16) squares = S::fma(S::load(x + i), S::load(x + i), squares);
    if (i < size) {
        const auto rest = S::load_first(x + i, static_cast<int>(size - i));
        squares = S::fma(rest, rest, squares);
    }
    const float mean = sum_lanes<S>(squares) / static_cast<float>(size);
    const float factor = 1.0f / __builtin_sqrtf(mean + eps);
    for (i = 0; i < size; ++i) h[i] = weight[i] * (x[i] * factor);
}

inline void rotate(float* head, const float* cosines, const float* sines, size_t head_dim) {
    const size_t half = head_dim / 2;
    for (size_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

template <class S>
void weighted_sum(const float* const* rows, const float* weights, size_t num_rows, size_t size, float* out) {
    size_t i = 0;
    for (; i + 16 <= size; i += 16) {
        auto sum = S::zero();
        for (size_t k = 0; k < num_rows; ++k) sum = S::fma(S::load(rows[k] + i), S::set1(weights[k]), sum);
        S::store(out + i, S::add(S::load(out + i), sum));
    }
    if (i < size) {
        const int rest = static_cast<int>(size - i);
        auto sum = S::zero();
        for (size_t k = 0; k < num_rows; ++k)
            sum = S::fma(S::load_first(rows[k] + i, rest), S::set1(weights[k]), sum);
        S::store_first(out + i, S::add(S::load_first(out + i, rest), sum), rest);
    }
}

template <class S>
int32_t soften(const float* logits, size_t size, float temperature, float* weights) {
    using F = typename S::F;
    const auto lanes_at = [&](size_t i) { return size - i < 16 ? static_cast<int>(size - i) : 16; };
    F most = S::set1(logits[0]);
    auto magnitudes = S::set1_int(0);
    for (size_t i = 0; i < size; i += 16) {
        const int n = lanes_at(i);
        const F x = n == 16 ? S::load(logits + i) : S::first(S::load_first(logits + i, n), S::set1(logits[i]), n);
        most = S::max(most, x);
        magnitudes = S::max_unsigned(magnitudes, S::magnitude(x));
    }
    if (max_lanes_unsigned<S>(magnitudes) >= 0x7F800000) return -1;
    const float largest = max_lanes<S>(most);
    if (temperature > 0.0f) {
        // Far below the maximum a quotient may overflow to minus infinity, whose weight is zero.
        const F factor = S::set1(1.0f / temperature), top = S::set1(largest);
        for (size_t i = 0; i < size; i += 16) {
            const int n = lanes_at(i);
            const F x = S::mul(S::sub(n == 16 ? S::load(logits + i) : S::load_first(logits + i, n), top), factor);
            // What exp clamps is so small that it must not add up over a vocabulary.
            const F weight = S::zero_below(exp<S>(x), x, -87.0f);
            n == 16 ? S::store(weights + i, weight) : S::store_first(weights + i, weight, n);
        }
    }
    for (size_t i = 0; i < size; ++i) {
        if (logits[i] == largest) return static_cast<int32_t>(i);
    }
    return -1;
}

template <class S>
uint64_t read(const uint8_t* data, size_t num_bytes) {
    auto sums = S::set1_int(0);
    size_t i = 0;
    for (; i + 256 <= num_bytes; i += 256) {
        for (size_t j = 0; j < 256; j += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(data + i + j + 2048), _MM_HINT_T0);
            sums = S::add_int(sums, S::load_bytes(data + i + j));
        }
    }
    return static_cast<uint64_t>(sum_lanes_int<S>(sums));
}

}  // namespace
