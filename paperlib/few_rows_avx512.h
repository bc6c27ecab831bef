// Registers and formats of `few_rows.cpp` on processors with AVX-512. A 32-bit lane multiplies one
// float32, two bfloat16 or four whole numbers of 8 bits at once.

#pragma once

#include "few_rows_float32.h"

namespace {

constexpr int PROJECT_ROWS = 6;    // of A ..
constexpr int PROJECT_COLUMNS = 4; // .. with so many of V fit the registers
constexpr int COMBINE_ROWS = 6;    // of W ..
constexpr int COMBINE_PAIRS = 2;   // .. with so many pairs of registers of V

#ifdef __AVX512BF16__
struct Bfloat16 : FloatingSums {
  using number = uint16_t;
  static constexpr int PER_LANE = 2;
  static constexpr int ORDER[8] = {0, 8, 16, 24, 4, 12, 20, 28};

  static Register first(const number *p, int count) {
    return _mm512_maskz_loadu_epi16((1ull << count) - 1, p);
  }
  static sums add_product(sums c, __m512i v, __m512i a) {
    return _mm512_dpbf16_ps(c, (__m512bh)v, (__m512bh)a);
  }

  // 32 columns of a pair of rows, pair by pair.
  static void order(const number *V, long d, __m512i &v, __m512i &u) {
    const __m512i one = _mm512_loadu_si512(V), other = _mm512_loadu_si512(V + d);
    v = _mm512_unpacklo_epi16(one, other);
    u = _mm512_unpackhi_epi16(one, other);
  }
};
#endif

#ifdef __AVX512VNNI__
// The instruction multiplies numbers without a sign with numbers with one: 128 is added to those of
// V, and 128 times the sum of the others is taken off in the end.
struct Int8 {
  using number = int8_t;
  using sums = __m512i;
  static constexpr int PER_LANE = 4;
  static constexpr int ORDER[8] = {0, 16, 4, 20, 8, 24, 12, 28};

  static sums zero() { return _mm512_setzero_si512(); }
  static sums add(sums a, sums b) { return _mm512_add_epi32(a, b); }
  static Register first(const number *p, int count) {
    return _mm512_maskz_loadu_epi8(count == 64 ? ~0ull : (1ull << count) - 1, p);
  }
  static sums add_product(sums c, __m512i v, __m512i a) {
    // For the intrinsic, GCC 12 stores the sums after every product.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(v), "v"(a));
    return c;
  }
  static __m512i of_v(__m512i v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
  static int32_t offset(const number *a, long count) {
    int32_t sum = 0;
    for (long k = 0; k < count; k++) sum += a[k];
    return 128 * sum;
  }
  static void write(float *to, sums c, int32_t offset) {
    _mm512_store_ps(to, _mm512_cvtepi32_ps(_mm512_sub_epi32(c, _mm512_set1_epi32(offset))));
  }

  // 32 columns of four rows, four by four.
  static void order(const number *V, long d, __m512i &v, __m512i &u) {
    const __m256i flip = _mm256_set1_epi8(-128);
    __m256i x[4];
    UNROLL for (int k = 0; k < 4; k++) {
      x[k] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(V + k * d)), flip);
    }
    const __m256i ab = _mm256_unpacklo_epi8(x[0], x[1]), AB = _mm256_unpackhi_epi8(x[0], x[1]);
    const __m256i cd = _mm256_unpacklo_epi8(x[2], x[3]), CD = _mm256_unpackhi_epi8(x[2], x[3]);
    v = both(_mm256_unpacklo_epi16(ab, cd), _mm256_unpackhi_epi16(ab, cd));
    u = both(_mm256_unpacklo_epi16(AB, CD), _mm256_unpackhi_epi16(AB, CD));
  }
  static __m512i both(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
};
#endif

// The totals of four registers, less an offset.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d, int32_t) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 all = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline __m128 totals(__m512i a, __m512i b, __m512i c, __m512i d, int32_t offset) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i low = _mm512_unpacklo_epi64(ab, cd), high = _mm512_unpackhi_epi64(ab, cd);
  const __m512i all = _mm512_add_epi32(low, high);
  const __m256i left = _mm512_castsi512_si256(all), right = _mm512_extracti32x8_epi32(all, 1);
  const __m256i half = _mm256_add_epi32(left, right);
  const __m128i first = _mm256_castsi256_si128(half), second = _mm256_extracti128_si256(half, 1);
  const __m128i sum = _mm_add_epi32(first, second);
  return _mm_cvtepi32_ps(_mm_sub_epi32(sum, _mm_set1_epi32(offset)));
}

inline void put(float *out, __m128 values, int count) {
  _mm_mask_storeu_ps(out, (1 << count) - 1, values);
}
#ifdef __AVX512BF16__
inline void put(uint16_t *out, __m128 values, int count) {
  _mm_mask_storeu_epi16(out, (1 << count) - 1, (__m128i)_mm_cvtneps_pbh(values));
}
#endif

} // namespace
