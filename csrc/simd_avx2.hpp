// Sixteen lanes in two registers: AVX2 with FMA and F16C; with LOCALMOE_AVX_VNNI, VNNI's products in 256 bits.
#pragma once

#include <immintrin.h>

#include "matrix.hpp"

namespace {

struct Avx2 {
    struct F {
        __m256 a, b;
    };
    struct I {
        __m256i a, b;
    };
    using B = I;

    static constexpr int kTokens = 2;      // two integer and two float accumulators take half of 16 registers
    static constexpr int kTileTokens = 0;  // no tiles

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static F load_first(const float* p, int n) {
        return {_mm256_maskload_ps(p, mask(n)),
                n > 8 ? _mm256_maskload_ps(p + 8, mask(n - 8)) : _mm256_setzero_ps()};
    }
    static void store_first(float* p, F x, int n) {
        _mm256_maskstore_ps(p, mask(n), x.a);
        if (n > 8) _mm256_maskstore_ps(p + 8, mask(n - 8), x.b);
    }
    static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    // Of a NaN and a number, y comes back.
    static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static F round(F x) {
        constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
    }
    // x in lanes below n, else `other`.
    static F first(F x, F other, int n) {
        return {_mm256_blendv_ps(other.a, x.a, _mm256_castsi256_ps(mask(n))),
                _mm256_blendv_ps(other.b, x.b, _mm256_castsi256_ps(mask(n - 8)))};
    }
    // x where `of` is at least `bound`, else 0.
    static F zero_below(F x, F of, float bound) {
        const __m256 limit = _mm256_set1_ps(bound);
        return {_mm256_and_ps(x.a, _mm256_cmp_ps(of.a, limit, _CMP_GE_OQ)),
                _mm256_and_ps(x.b, _mm256_cmp_ps(of.b, limit, _CMP_GE_OQ))};
    }
    static __m256 low(F x) { return x.a; }
    static __m256 high(F x) { return x.b; }

    static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
    static I set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static I add_int(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
    static I max_unsigned(I x, I y) { return {_mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)}; }
    template <int n>
    static I shift_left(I x) {
        return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
    }
    static I as_int(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
    static F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
    static I magnitude(F x) {
        const __m256i bits = _mm256_set1_epi32(0x7FFFFFFF);
        const I raw = as_int(x);
        return {_mm256_and_si256(raw.a, bits), _mm256_and_si256(raw.b, bits)};
    }
    static I from_bytes(const uint8_t* p) {
        return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
    }
    static I from_words(const uint16_t* p) {
        return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
    }
    static F from_half(const uint8_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
    }
    // E4M3 bits read as float16 are the value / 256, subnormals included; NaN does not survive and is not stored.
    static F from_e4m3_over_256(const uint8_t* p) {
        const __m256i wide =
            _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(wide)), _mm256_cvtph_ps(_mm256_extracti128_si256(wide, 1))};
    }
    static void store_bytes(int8_t* p, I x) {
        // Packing works within 128-bit halves; the permutation puts the halves back in order.
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }

    static B load_bytes(const uint8_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
    }
    static void store_bytes(uint8_t* p, B x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
    }
    // E2M1 codes, doubled to integers and 12 added.
    static B e2m1_low(B codes) { return {lookup(codes.a), lookup(codes.b)}; }
    static B e2m1_high(B codes) {
        return {lookup(_mm256_srli_epi16(codes.a, 4)), lookup(_mm256_srli_epi16(codes.b, 4))};
    }
    // Per lane, adds the products of unsigned weights and int8 inputs, four of each pair. "Small" weights are at
    // most 24.
    static I dot_small(I sum, B first, I first_input, B second, I second_input) {
        return {dot_small(sum.a, first.a, first_input.a, second.a, second_input.a),
                dot_small(sum.b, first.b, first_input.a, second.b, second_input.a)};
    }
    static I dot_wide(I sum, B first, I first_input, B second, I second_input) {
        return {dot_wide(dot_wide(sum.a, first.a, first_input.a), second.a, second_input.a),
                dot_wide(dot_wide(sum.b, first.b, first_input.a), second.b, second_input.a)};
    }
#ifdef LOCALMOE_AVX_VNNI
    static constexpr int kWideOffset = 128;
#else
    static constexpr int kWideOffset = 0;  // `dot_wide` takes the offset off itself
#endif
    static F even_bf16(B pairs) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.a, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(pairs.b, 16))};
    }
    static F odd_bf16(B pairs) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
        return {_mm256_castsi256_ps(_mm256_and_si256(pairs.a, upper)),
                _mm256_castsi256_ps(_mm256_and_si256(pairs.b, upper))};
    }

private:
    static __m256i mask(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static __m256i lookup(__m256i codes) {
        const __m256i table =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
    }
#ifdef LOCALMOE_AVX_VNNI
    static __m256i dot_small(__m256i sum, __m256i first, __m256i x, __m256i second, __m256i y) {
        return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, first, x), second, y);
    }
    static __m256i dot_wide(__m256i sum, __m256i weights, __m256i x) {
        return _mm256_dpbusd_avx_epi32(sum, weights, x);
    }
#else
    static __m256i add_pairs(__m256i sum, __m256i pairs) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    // Four products of at most 24 * 127 stay within 16 bits.
    static __m256i dot_small(__m256i sum, __m256i first, __m256i x, __m256i second, __m256i y) {
        return add_pairs(sum, _mm256_add_epi16(_mm256_maddubs_epi16(first, x), _mm256_maddubs_epi16(second, y)));
    }
    // Two of 255 * 127 would not, so the weights' signs move to the inputs.
    static __m256i dot_wide(__m256i sum, __m256i weights, __m256i x) {
        const __m256i w = _mm256_xor_si256(weights, _mm256_set1_epi8(static_cast<char>(0x80)));
        return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
    }
#endif
};

}  // namespace
