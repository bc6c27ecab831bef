// What lies between the two products of a pass, for a range of features on one thread.
// `between_products.py` says what it is for, and has the formulas.

#pragma once

#include "lanes.h"

namespace {

// The activations at the samples, entry by entry: slopes and features as they are given, ..
template <class Number> struct Given {
  const Number *slopes;
  long slopes_apart;
  const Number *features;
  long features_apart;

  Given from(long k) const { return {slopes + k, slopes_apart, features + k, features_apart}; }
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

  TwoSlopes from(long k) const { return {inputs + k, apart, left, right}; }
  Lanes input(long i, long k, Part part) const { return load(inputs + i * apart + k, part); }
  Lanes slope(long i, long k, Part part) const {
    return where_positive(input(i, k, part), all(right), all(left));
  }
  Lanes feature(long i, long k, Part part, Lanes slope) const {
    return multiply(slope, input(i, k, part));
  }
};

// The step that a product is made for.
struct Step {
  const float *alpha;  // (n,), where V is in 8 bits times the scales of dX
  const float *da;     // (n,)
  float linear;        // what the row of the linear part is multiplied with
  const float *scales; // of the rows of V, null for 1
  long n, rows;        // samples; one more with a linear part

  Step from(long k) const { return {alpha, da, linear, scales ? scales + k : scales, n, rows}; }
};

// T of LANES features from k on, and T times the scales of V.
template <class Number, class Activations>
void sum_over_samples(const Number *U, long apart, const Activations &at, const Step &step, long k,
                      long h, float *T, float *back) {
  const Part part = first(h - k);
  Lanes through = all(0), beside = all(0);
  for (long i = 0; i < step.n; i++) {
    const Lanes s = at.slope(i, k, part);
    const Lanes u = multiply(s, load(U + i * apart + k, part));
    through = multiply_add(all(step.alpha[i]), u, through);
    const Lanes phi = at.feature(i, k, part, s);
    beside = multiply_add(all(step.da[i]), phi, beside);
  }
  if (step.rows > step.n) {
    const Lanes w = load(U + step.n * apart + k, part);
    through = multiply_add(all(step.linear), w, through);
  }
  const Lanes scale = step.scales ? load(step.scales + k, part) : all(1);
  const Lanes t = multiply_add(scale, through, beside);
  store(T + k, t, part);
  if (back != T) store(back + k, multiply(scale, t), part);
}

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

// Row i of W, and the product of the features of sample i with T: zero below the samples.
template <class Activations, class Out>
float turn_row(const Activations &at, const Step &step, long i, const float *T, const float *back,
               Out *W, float *W_scale, long h) {
  Lanes sum = all(0);
  for (long k = 0; i < step.n && k < h; k += LANES) {
    const Part part = first(h - k);
    const Lanes phi = at.feature(i, k, part, at.slope(i, k, part));
    sum = multiply_add(phi, load(T + k, part), sum);
  }
  write(at, i, step.n, back, W, W_scale, h);
  return sum_of(sum);
}

} // namespace
