// Registers and formats of `few_rows.cpp` on processors with AVX2 and FMA: float32 alone.

#pragma once

#include <immintrin.h>

#include <cstdint>

#define UNROLL _Pragma("GCC unroll 16")

namespace {

using Register = __m256i;

constexpr int LANES = 8;           // of a register
constexpr int PROJECT_ROWS = 4;    // of A ..
constexpr int PROJECT_COLUMNS = 3; // .. with so many of V fit the registers
constexpr int COMBINE_ROWS = 6;    // of W, with two registers of V

inline Register load(const void *p) { return _mm256_loadu_si256((const Register *)p); }
inline void store(void *p, Register values) { _mm256_store_si256((Register *)p, values); }
inline Register broadcast(int32_t number) { return _mm256_set1_epi32(number); }

// A load that is not made again for every product.
inline Register load_once(const void *p) {
  Register loaded = load(p);
  __asm__("" : "+x"(loaded));
  return loaded;
}

struct Float32 {
  using number = float;
  using sums = __m256;
  static constexpr int PER_LANE = 1;
  static constexpr int ORDER[4] = {0, 4, 8, 12};

  static sums zero() { return _mm256_setzero_ps(); }
  static sums add(sums a, sums b) { return _mm256_add_ps(a, b); }
  static sums add_product(sums c, Register v, Register a) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(v), _mm256_castsi256_ps(a), c);
  }
  static Register of_v(Register v) { return v; }
  static int32_t offset(const void *, long) { return 0; }
  static void write(float *to, sums c, int32_t) { _mm256_store_ps(to, c); }
  static Register first(const number *p, int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
    return _mm256_castps_si256(_mm256_maskload_ps(p, there));
  }

  // 16 columns of a row.
  static void order(const number *V, long, Register &v, Register &u) {
    v = load(V);
    u = load(V + LANES);
  }
};

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
