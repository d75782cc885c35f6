// Sixteen lanes in one register: AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include "matrix.hpp"

namespace {

struct Avx512 {
    using F = __m512;
    using I = __m512i;
    using B = __m512i;  // 64 bytes

    static constexpr int kTokens = 12;     // 12 integer and 12 float accumulators leave 8 of 32 registers
    static constexpr int kTileTokens = 0;  // no tiles
    static constexpr int kWideOffset = 128;

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
    static void store_first(float* p, F x, int n) { _mm512_mask_storeu_ps(p, mask(n), x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    // Of a NaN and a number, b comes back.
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // x in lanes below n, else `other`.
    static F first(F x, F other, int n) { return _mm512_mask_mov_ps(other, mask(n), x); }
    // x where `of` is at least `bound`, else 0.
    static F zero_below(F x, F of, float bound) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(of, _mm512_set1_ps(bound), _CMP_GE_OQ), x);
    }
    static __m256 low(F x) { return _mm512_castps512_ps256(x); }
    static __m256 high(F x) { return _mm512_extractf32x8_ps(x, 1); }

    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static I to_int(F x) { return _mm512_cvtps_epi32(x); }
    static I set1_int(int32_t x) { return _mm512_set1_epi32(x); }
    static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
    static I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
    template <int n>
    static I shift_left(I x) {
        return _mm512_slli_epi32(x, n);
    }
    static I as_int(F x) { return _mm512_castps_si512(x); }
    static F as_float(I x) { return _mm512_castsi512_ps(x); }
    static I magnitude(F x) { return _mm512_and_si512(as_int(x), set1_int(0x7FFFFFFF)); }
    static I from_bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static I from_words(const uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F from_half(const uint8_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    // E4M3 bits read as float16 are the value / 256, subnormals included; NaN does not survive and is not stored.
    static F from_e4m3_over_256(const uint8_t* p) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 7));
    }
    static void store_bytes(int8_t* p, I x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x));
    }

    static B load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store_bytes(uint8_t* p, B x) { _mm512_storeu_si512(p, x); }
    // E2M1 codes, doubled to integers and 12 added.
    static B e2m1_low(B codes) { return _mm512_shuffle_epi8(table(), _mm512_and_si512(codes, nibbles())); }
    static B e2m1_high(B codes) {
        return _mm512_shuffle_epi8(table(), _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibbles()));
    }
    // Per lane, adds the products of unsigned weights and int8 inputs, four of each pair. "Small" weights are at
    // most 24.
    static I dot_small(I sum, B first, I first_input, B second, I second_input) {
        return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, first, first_input), second, second_input);
    }
    static I dot_wide(I sum, B first, I first_input, B second, I second_input) {
        return dot_small(sum, first, first_input, second, second_input);
    }
    static F even_bf16(B pairs) { return as_float(_mm512_slli_epi32(pairs, 16)); }
    static F odd_bf16(B pairs) {
        return as_float(_mm512_and_si512(pairs, set1_int(static_cast<int>(0xFFFF0000))));
    }

private:
    static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    static B nibbles() { return _mm512_set1_epi8(15); }
    static B table() {
        return _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    }
};

}  // namespace
