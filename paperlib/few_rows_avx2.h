// Registers and formats of `few_rows.cpp` on processors with AVX2 and FMA: float32 alone.

#pragma once

#include "few_rows_float32.h"

namespace {

constexpr int PROJECT_ROWS = 4;    // of A ..
constexpr int PROJECT_COLUMNS = 3; // .. with so many of V fit the registers
constexpr int COMBINE_ROWS = 6;    // of W ..
constexpr int COMBINE_PAIRS = 1;   // .. with so many pairs of registers of V

// The totals of four registers.
inline __m128 totals(__m256 a, __m256 b, __m256 c, __m256 d, int32_t) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

inline void put(float *out, __m128 values, int count) {
  const __m128i there = _mm_cmpgt_epi32(_mm_set1_epi32(count), _mm_setr_epi32(0, 1, 2, 3));
  _mm_maskstore_ps(out, there, values);
}

} // namespace
