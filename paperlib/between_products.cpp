// What lies between the two products of a pass: U = dX V^T and dw V^T in, W for W V out.
// `between_products.py` says what it is for, and has the formulas.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr long LANES = 16;

inline __mmask16 first(long count) { return count >= LANES ? 0xffff : (1 << count) - 1; }

inline __m512 load(const float *p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load(const uint16_t *p, __mmask16 mask) { // bfloat16
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(float *p, __m512 values, __mmask16 mask) {
  _mm512_mask_storeu_ps(p, mask, values);
}
#ifdef __AVX512BF16__
inline void store(uint16_t *p, __m512 values, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(values));
}
#endif

// A part of a row of W: `slope` times `back`, or `back` alone.
template <class Number>
__m512 part_of_row(const Number *slope, const float *back, long k, __mmask16 mask) {
  const __m512 t = load(back + k, mask);
  return slope ? _mm512_mul_ps(load(slope + k, mask), t) : t;
}

// One row of W, in the format of the product.
template <class Number, class Out>
void write(const Number *slope, const float *back, Out *out, float *, long h) {
  for (long k = 0; k < h; k += LANES) {
    const __mmask16 mask = first(h - k);
    store(out + k, part_of_row(slope, back, k, mask), mask);
  }
}
// In 8 bits the largest of the row becomes 127.
template <class Number>
void write(const Number *slope, const float *back, int8_t *out, float *scale, long h) {
  __m512 largest = _mm512_setzero_ps();
  for (long k = 0; k < h; k += LANES) {
    const __m512 w = part_of_row(slope, back, k, first(h - k));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(w));
  }
  const float most = _mm512_reduce_max_ps(largest);
  *scale = (most > 0 ? most : 1) / 127;
  const __m512 by = _mm512_set1_ps(1 / *scale);
  for (long k = 0; k < h; k += LANES) {
    const __mmask16 mask = first(h - k);
    const __m512 w = part_of_row(slope, back, k, mask);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(w, by)); // to the nearest
    _mm512_mask_cvtsepi32_storeu_epi8(out + k, mask, whole);
  }
}

template <class Number, class Out>
void turn(const Number *U, const Number *slopes, long slopes_apart, const Number *features,
          long features_apart, const float *alpha, const float *da, float linear,
          const float *scales, long n, long rows, long h, Out *W, float *W_scales, float *Ha,
          int threads) {
  const long padded = (h + LANES - 1) / LANES * LANES;
  float *T = static_cast<float *>(std::aligned_alloc(64, 2 * padded * sizeof(float)));
  float *back = scales ? T + padded : T;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long k = 0; k < padded; k += LANES) {
      const __mmask16 mask = first(h - k);
      __m512 through = _mm512_setzero_ps(), beside = _mm512_setzero_ps();
      for (long i = 0; i < n; i++) {
        const __m512 s = load(slopes + i * slopes_apart + k, mask);
        const __m512 u = _mm512_mul_ps(s, load(U + i * h + k, mask));
        through = _mm512_fmadd_ps(_mm512_set1_ps(alpha[i]), u, through);
        const __m512 phi = load(features + i * features_apart + k, mask);
        beside = _mm512_fmadd_ps(_mm512_set1_ps(da[i]), phi, beside);
      }
      if (rows > n) {
        const __m512 w = load(U + n * h + k, mask);
        through = _mm512_fmadd_ps(_mm512_set1_ps(linear), w, through);
      }
      const __m512 scale = scales ? load(scales + k, mask) : _mm512_set1_ps(1);
      const __m512 t = _mm512_fmadd_ps(scale, through, beside);
      _mm512_store_ps(T + k, t);
      if (scales) _mm512_store_ps(back + k, _mm512_mul_ps(scale, t));
    }
#pragma omp for schedule(static)
    for (long i = 0; i < rows; i++) {
      if (i < n) {
        const Number *row = features + i * features_apart;
        __m512 sum = _mm512_setzero_ps();
        for (long k = 0; k < h; k += LANES) {
          sum = _mm512_fmadd_ps(load(row + k, first(h - k)), _mm512_load_ps(T + k), sum);
        }
        Ha[i] = _mm512_reduce_add_ps(sum);
      }
      const Number *slope = i < n ? slopes + i * slopes_apart : nullptr;
      write(slope, back, W + i * h, W_scales + i, h);
    }
  }
  std::free(T);
}

} // namespace

extern "C" {
#define TURN(name, Number, Out)                                                                    \
  void name(const Number *U, const Number *slopes, long slopes_apart, const Number *features,      \
            long features_apart, const float *alpha, const float *da, float linear,                \
            const float *scales, long n, long rows, long h, Out *W, float *W_scales, float *Ha,    \
            int threads) {                                                                         \
    turn(U, slopes, slopes_apart, features, features_apart, alpha, da, linear, scales, n, rows, h, \
         W, W_scales, Ha, threads);                                                                \
  }
TURN(turn_float32, float, float)
#ifdef __AVX512BF16__
TURN(turn_bfloat16, uint16_t, uint16_t)
#endif
TURN(turn_int8, float, int8_t)
}
