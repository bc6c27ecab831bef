// Numbers side by side in a register, for work entry by entry on float32: sixteen with AVX-512,
// eight with AVX2. A `Part` says how many of them there are, at the end of a row.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define UNROLL _Pragma("GCC unroll 16")

// All of AVX-512 that is used here: the first processors that had any of it had no more than F.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SIXTEEN_LANES
#endif

namespace {

struct Float16Number {
  uint16_t bits;
};
struct Bfloat16Number {
  uint16_t bits;
};

#ifdef SIXTEEN_LANES

constexpr int LANES = 16;
using Lanes = __m512;
using Register = __m512i; // whatever is in it
using Part = __mmask16;

inline Register load(const void *p) { return _mm512_loadu_si512(p); }
inline void store(void *p, Register values) { _mm512_store_si512(p, values); }
inline Register broadcast(int32_t number) { return _mm512_set1_epi32(number); }

inline Part first(long count) { return count >= LANES ? 0xffff : (1 << count) - 1; }
inline Lanes all(float number) { return _mm512_set1_ps(number); }

inline Lanes load(const float *p, Part part) { return _mm512_maskz_loadu_ps(part, p); }
inline Lanes load(const Float16Number *p, Part part) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(part, p));
}
inline Lanes load(const Bfloat16Number *p, Part part) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(part, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float *p, Lanes values, Part part) { _mm512_mask_storeu_ps(p, part, values); }
#ifdef __AVX512BF16__
inline void store(Bfloat16Number *p, Lanes values, Part part) {
  _mm256_mask_storeu_epi16(p, part, (__m256i)_mm512_cvtneps_pbh(values));
}
#endif
// Whole numbers: to the nearest.
inline void store(int8_t *p, Lanes values, Part part) {
  _mm512_mask_cvtsepi32_storeu_epi8(p, part, _mm512_cvtps_epi32(values));
}

inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes size(Lanes a) { return _mm512_abs_ps(a); }
inline Lanes where_positive(Lanes a, Lanes then, Lanes otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, all(0), _CMP_GT_OQ), otherwise, then);
}
inline float sum_of(Lanes a) { return _mm512_reduce_add_ps(a); }
inline float largest_of(Lanes a) { return _mm512_reduce_max_ps(a); }

#else

constexpr int LANES = 8;
using Lanes = __m256;
using Register = __m256i; // whatever is in it
using Part = int;

inline Register load(const void *p) { return _mm256_loadu_si256((const Register *)p); }
inline void store(void *p, Register values) { _mm256_store_si256((Register *)p, values); }
inline Register broadcast(int32_t number) { return _mm256_set1_epi32(number); }

inline Part first(long count) { return count >= LANES ? LANES : count; }
inline Lanes all(float number) { return _mm256_set1_ps(number); }

inline __m256i there(Part part) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(part), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Lanes load(const float *p, Part part) { return _mm256_maskload_ps(p, there(part)); }
inline Lanes load(const Float16Number *p, Part part) {
  __m128i bits = _mm_setzero_si128();
  if (part == LANES) {
    bits = _mm_loadu_si128((const __m128i *)p);
  } else {
    std::memcpy(&bits, p, part * sizeof(*p));
  }
  return _mm256_cvtph_ps(bits);
}
inline void store(float *p, Lanes values, Part part) {
  _mm256_maskstore_ps(p, there(part), values);
}
// Whole numbers: to the nearest.
inline void store(int8_t *p, Lanes values, Part part) {
  const __m256i wide = _mm256_cvtps_epi32(values);
  const __m128i low = _mm256_castsi256_si128(wide), high = _mm256_extracti128_si256(wide, 1);
  const __m128i narrow = _mm_packs_epi16(_mm_packs_epi32(low, high), _mm_setzero_si128());
  std::memcpy(p, &narrow, part);
}

inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes larger(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
inline Lanes size(Lanes a) { return _mm256_andnot_ps(all(-0.0f), a); }
inline Lanes where_positive(Lanes a, Lanes then, Lanes otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, all(0), _CMP_GT_OQ));
}
inline float sum_of(Lanes a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_hadd_ps(four, four);
  return _mm_cvtss_f32(_mm_hadd_ps(two, two));
}
inline float largest_of(Lanes a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#endif

} // namespace
