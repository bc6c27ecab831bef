// What lies between the two products of a pass: U = dX V^T and dw V^T in, W for W V out.
// `between_products.py` says what it is for, and has the formulas.

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "lanes.h"

namespace {

// The activations at the samples, entry by entry: slopes and features as they are given, ..
template <class Number> struct Given {
  const Number *slopes;
  long slopes_apart;
  const Number *features;
  long features_apart;

  Lanes slope(long i, long k, Part part) const {
    return load(slopes + i * slopes_apart + k, part);
  }
  Lanes feature(long i, long k, Part part, Lanes) const {
    return load(features + i * features_apart + k, part);
  }
};
// .. or, of an activation that is linear on either side of 0, from their inputs.
template <class Number> struct TwoSlopes {
  const Number *inputs;
  long apart;
  float left, right;

  Lanes input(long i, long k, Part part) const { return load(inputs + i * apart + k, part); }
  Lanes slope(long i, long k, Part part) const {
    return where_positive(input(i, k, part), all(right), all(left));
  }
  Lanes feature(long i, long k, Part part, Lanes slope) const {
    return multiply(slope, input(i, k, part));
  }
};

// A part of row i of W: the slopes of sample i times `back`; `back` alone below the samples.
template <class Activations>
Lanes part_of_row(const Activations &at, long i, long n, const float *back, long k, Part part) {
  const Lanes t = load(back + k, part);
  return i < n ? multiply(at.slope(i, k, part), t) : t;
}

// Row i of W, in the format of the product.
template <class Activations, class Out>
void write(const Activations &at, long i, long n, const float *back, Out *out, float *, long h) {
  for (long k = 0; k < h; k += LANES) {
    const Part part = first(h - k);
    store(out + k, part_of_row(at, i, n, back, k, part), part);
  }
}
// In 8 bits the largest of the row becomes 127.
template <class Activations>
void write(const Activations &at, long i, long n, const float *back, int8_t *out, float *scale,
           long h) {
  Lanes largest = all(0);
  for (long k = 0; k < h; k += LANES) {
    const Lanes w = part_of_row(at, i, n, back, k, first(h - k));
    largest = larger(largest, size(w));
  }
  const float most = largest_of(largest);
  *scale = (most > 0 ? most : 1) / 127;
  const Lanes by = all(1 / *scale);
  for (long k = 0; k < h; k += LANES) {
    const Part part = first(h - k);
    const Lanes w = part_of_row(at, i, n, back, k, part);
    store(out + k, multiply(w, by), part);
  }
}

template <class Number, class Activations, class Out>
void turn(const Number *U, const Activations &at, const float *alpha, const float *da,
          float linear, const float *scales, long n, long rows, long h, Out *W, float *W_scales,
          float *Ha, int threads) {
  const long padded = (h + LANES - 1) / LANES * LANES;
  float *T = static_cast<float *>(std::aligned_alloc(64, 2 * padded * sizeof(float)));
  float *back = scales ? T + padded : T;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long k = 0; k < padded; k += LANES) {
      const Part part = first(h - k);
      Lanes through = all(0), beside = all(0);
      for (long i = 0; i < n; i++) {
        const Lanes s = at.slope(i, k, part);
        const Lanes u = multiply(s, load(U + i * h + k, part));
        through = multiply_add(all(alpha[i]), u, through);
        const Lanes phi = at.feature(i, k, part, s);
        beside = multiply_add(all(da[i]), phi, beside);
      }
      if (rows > n) {
        const Lanes w = load(U + n * h + k, part);
        through = multiply_add(all(linear), w, through);
      }
      const Lanes scale = scales ? load(scales + k, part) : all(1);
      const Lanes t = multiply_add(scale, through, beside);
      store(T + k, t, part);
      if (scales) store(back + k, multiply(scale, t), part);
    }
#pragma omp for schedule(static)
    for (long i = 0; i < rows; i++) {
      if (i < n) {
        Lanes sum = all(0);
        for (long k = 0; k < h; k += LANES) {
          const Part part = first(h - k);
          const Lanes phi = at.feature(i, k, part, at.slope(i, k, part));
          sum = multiply_add(phi, load(T + k, part), sum);
        }
        Ha[i] = sum_of(sum);
      }
      write(at, i, n, back, W + i * h, W_scales + i, h);
    }
  }
  std::free(T);
}

} // namespace

// By the format of the products; those of 8 bits come and go in float32.
extern "C" {
#define TURN(name, Number, Out)                                                                    \
  void turn_##name(const Number *U, const Number *slopes, long slopes_apart,                       \
                   const Number *features, long features_apart, const float *alpha,                \
                   const float *da, float linear, const float *scales, long n, long rows, long h,  \
                   Out *W, float *W_scales, float *Ha, int threads) {                              \
    const Given<Number> at{slopes, slopes_apart, features, features_apart};                        \
    turn(U, at, alpha, da, linear, scales, n, rows, h, W, W_scales, Ha, threads);                  \
  }
#define TURN_TWO_SLOPES(name, Number, Inputs, Out)                                                 \
  void turn_two_slopes_##name(const Number *U, const Inputs *inputs, long apart, float left,       \
                              float right, const float *alpha, const float *da, float linear,      \
                              const float *scales, long n, long rows, long h, Out *W,              \
                              float *W_scales, float *Ha, int threads) {                           \
    const TwoSlopes<Inputs> at{inputs, apart, left, right};                                        \
    turn(U, at, alpha, da, linear, scales, n, rows, h, W, W_scales, Ha, threads);                  \
  }
TURN(float32, float, float)
TURN_TWO_SLOPES(float32_float32, float, float, float)
TURN_TWO_SLOPES(float32_float16, float, Float16Number, float)
#ifdef __AVX512BF16__
TURN(bfloat16, Bfloat16Number, Bfloat16Number)
TURN_TWO_SLOPES(bfloat16_bfloat16, Bfloat16Number, Bfloat16Number, Bfloat16Number)
#endif
TURN(int8, float, int8_t)
TURN_TWO_SLOPES(int8_float32, float, float, int8_t)
TURN_TWO_SLOPES(int8_float16, float, Float16Number, int8_t)
}
