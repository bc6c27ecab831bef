// Both products of a pass, and what lies between them, in one reading of V, on the matrix units of
// a processor. `one_reading.py` compiles this file and says what it is for.
//
// The units multiply about as fast as the memory gives V. While a chunk of V goes through the first
// product it is brought into order for the second; what comes out of the one and goes into the
// other stays in the cache, in float32.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)

#include <omp.h>

#include <algorithm>
#include <vector>

#include "between_products.h"
#include "combination.h"
#include "float32_pass.h"
#include "shares.h"

namespace {

// A range whose U = A V^T is known, rows as far apart as those of W, which is to be made.
template <class Number> struct Between : Range<Number> {
  const float *U;

  const float *u(long i) const { return U + i * this->apart; }
  float *scale(long i) const { return this->scales ? this->scales + i : nullptr; }
};

// Adds W V to out, m rows to its (height, d), for the W that `turn` makes of A V^T.
template <class F, class Turn>
void pass_in_chunks(const typename F::number *A, long sent, const typename F::number *V, long m,
                    float *out, long height, long h, long d, int threads, const Turn &turn) {
  Right<F> right(sent, d);
  add_chunks<F, float>(m, out, height, h, d, threads, [&](long chunk) {
    right.fill(A);
    return [&, projection = Projection<F>(right),
            U = allocate<float>(sent * chunk)](const Work<F> &here) mutable {
      for (long k = 0; k < rounded_up(here.count, STEP<F>); k += PANEL) {
        const long rows = std::clamp<long>(here.count - k, 0, PANEL);
        projection.add(V + (here.begin + k) * d, rows, U.get() + k, here.apart, &here.V, k);
      }
      turn(Between<typename F::number>{here, U.get()});
    };
  });
}

struct Float32 {
  using number = float;
};

// The same in float32 in parts, 32 rows of V at a time.
template <class Turn>
void pass_in_parts(const float *A, long sent, const float *V, long m, float *out, long height,
                   long h, long d, int threads, const Turn &turn) {
  FewRows<true> right(sent, d);
  std::vector<Float32Pass *> all_sums(threads);
#pragma omp parallel num_threads(threads)
  {
    right.fill(A);
    Units units;
    Float32Pass mine(right, m, V, h, d);
    const long me = omp_get_thread_num(), team = omp_get_num_threads();
    all_sums[me] = &mine;
    auto U = allocate<float>(sent * WIDTH), W = allocate<float>(m * WIDTH);
    const long panels = parts_of(h, WIDTH), end = begin_of(me + 1, panels, team);
    for (long panel = begin_of(me, panels, team); panel < end; panel++) {
      const long begin = panel * WIDTH, count = std::min<long>(WIDTH, h - begin);
      mine.ask_after(panel, end);
      mine.project(panel, count, U.get(), WIDTH);
      turn(Between<float>{{begin, count, WIDTH, W.get(), nullptr}, U.get()});
      mine.combine(panel, count, W.get(), WIDTH);
    }
#pragma omp barrier
    add_up(all_sums.data(), team, out, height);
  }
}

template <class F, class... Rest> void pass(Rest &&...rest) {
  if constexpr (std::is_same_v<F, Float32>) {
    pass_in_parts(rest...);
  } else {
    pass_in_chunks<F>(rest...);
  }
}

// ---- a Gauss-Newton product

template <class F, class Activations>
void product(const typename F::number *A, const typename F::number *V, const Activations &at,
             const Step &step, float *HX, float *Ha, long h, long d, int threads) {
  const long m = step.rows;
  auto all_Ha = zeros<float>(threads * m);
  pass<F>(A, m, V, m, HX, m, h, d, threads, [&](const auto &here) {
    alignas(64) float T[MOST_CHUNK], scaled[MOST_CHUNK];
    float *back = step.scales ? scaled : T, *my_Ha = all_Ha.get() + omp_get_thread_num() * m;
    const Step now = step.from(here.begin);
    const auto there = at.from(here.begin);
    for (long k = 0; k < here.count; k += LANES) {
      sum_over_samples(here.U, here.apart, there, now, k, here.count, T, back);
    }
    for (long i = 0; i < m; i++) {
      my_Ha[i] += turn_row(there, now, i, T, back, here.w(i), here.scale(i), here.count);
    }
  });
  for (int t = 0; t < threads; t++) {
    for (long i = 0; i < step.n; i++) Ha[i] += all_Ha[t * m + i];
  }
}

// As they come back from memory.
template <class Number> Lanes rounded(Lanes a) {
  if constexpr (std::is_same_v<Number, float>) return a;
  const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// ---- loss and gradient, for an activation that is linear on either side of 0

// Inputs U = X V^T and features of the samples, both rounded, and features V.
template <class F, class Number = typename F::number>
void forward(const Number *X, const Number *V, float left, float right, long n, long h, long d,
             Number *inputs, Number *features, float *through, int threads) {
  pass<F>(X, n, V, n, through, n, h, d, threads, [&](const auto &here) {
    const TwoSlopes<Number> at{inputs + here.begin, h, left, right};
    for (long i = 0; i < n; i++) {
      for (long k = 0; k < here.count; k += LANES) {
        const Part part = first(here.count - k);
        const long entry = i * h + here.begin + k;
        store(inputs + entry, load(here.u(i) + k, part), part);
        const Lanes phi = at.feature(i, k, part, at.slope(i, k, part));
        store(features + entry, phi, part);
        store(here.w(i) + k, phi, part);
      }
    }
  });
}

// The residual E = theta - sum_i alpha_i phi_i - V w, and (slopes_i * E) V.
template <class F, class Number = typename F::number>
void backward(const Number *w, const Number *V, const TwoSlopes<Number> &at, const float *theta,
              const float *alpha, long n, long h, long d, float *residual, float *through,
              int threads) {
  pass<F>(w, 1, V, n, through, n, h, d, threads, [&](const auto &here) {
    const auto there = at.from(here.begin);
    float *E = residual + here.begin;
    for (long k = 0; k < here.count; k += LANES) {
      const Part part = first(here.count - k);
      Lanes explained = load(here.U + k, part);
      for (long i = 0; i < n; i++) {
        const Lanes phi = rounded<Number>(there.feature(i, k, part, there.slope(i, k, part)));
        explained = multiply_add(all(alpha[i]), phi, explained);
      }
      const Lanes e = multiply_add(all(-1), explained, load(theta + here.begin + k, part));
      store(E + k, e, part);
    }
    for (long i = 0; i < n; i++) write(there, i, n, E, here.w(i), here.scales, here.count);
  });
}

// ---- sum_k y_k (q . v_k) v_k for the rows q of Q

template <class F, class Number = typename F::number>
void second_moment(const Number *Q, const Number *V, const float *Y, long q, long h, long d,
                   float *out, int threads) {
  pass<F>(Q, q, V, q, out, q, h, d, threads, [&](const auto &here) {
    for (long i = 0; i < q; i++) {
      for (long k = 0; k < here.count; k += LANES) {
        const Part part = first(here.count - k);
        const Lanes y = load(Y + here.begin + k, part);
        store(here.w(i) + k, multiply(y, load(here.u(i) + k, part)), part);
      }
    }
  });
}

} // namespace

// Sizes: A (rows, d), V (h, d), W (m, h). What comes back is added to HX (rows, d), Ha (n,),
// `through` (n, d) and `out` (q, d).
extern "C" {
#define PRODUCT(name, Format, Number)                                                              \
  void product_##name(const Format::number *A, const Format::number *V, const Number *slopes,      \
                      long slopes_apart, const Number *features, long features_apart,              \
                      const float *alpha, const float *da, float linear, const float *scales,      \
                      long n, long rows, long h, long d, float *HX, float *Ha, int threads) {      \
    const Given<Number> at{slopes, slopes_apart, features, features_apart};                        \
    product<Format>(A, V, at, {alpha, da, linear, scales, n, rows}, HX, Ha, h, d, threads);        \
  }
#define PRODUCT_TWO_SLOPES(name, Format, Number)                                                   \
  void product_two_slopes_##name(                                                                  \
      const Format::number *A, const Format::number *V, const Number *inputs, long apart,          \
      float left, float right, const float *alpha, const float *da, float linear,                  \
      const float *scales, long n, long rows, long h, long d, float *HX, float *Ha, int threads) { \
    const TwoSlopes<Number> at{inputs, apart, left, right};                                        \
    product<Format>(A, V, at, {alpha, da, linear, scales, n, rows}, HX, Ha, h, d, threads);        \
  }
PRODUCT(bfloat16, Bfloat16, Bfloat16Number)
PRODUCT_TWO_SLOPES(bfloat16_bfloat16, Bfloat16, Bfloat16Number)
PRODUCT(int8, Int8, float)
PRODUCT_TWO_SLOPES(int8_float32, Int8, float)
PRODUCT_TWO_SLOPES(int8_float16, Int8, Float16Number)
PRODUCT(float32, Float32, float)
PRODUCT_TWO_SLOPES(float32_float32, Float32, float)
PRODUCT_TWO_SLOPES(float32_float16, Float32, Float16Number)

#define LOSS_AND_GRADIENT(name, Format)                                                            \
  void forward_##name(const Format::number *X, const Format::number *V, float left, float right,   \
                      long n, long h, long d, Format::number *inputs, Format::number *features,    \
                      float *through, int threads) {                                               \
    forward<Format>(X, V, left, right, n, h, d, inputs, features, through, threads);               \
  }                                                                                                \
  void backward_##name(const Format::number *w, const Format::number *V,                           \
                       const Format::number *inputs, long apart, float left, float right,          \
                       const float *theta, const float *alpha, long n, long h, long d,             \
                       float *residual, float *through, int threads) {                             \
    const TwoSlopes<Format::number> at{inputs, apart, left, right};                                \
    backward<Format>(w, V, at, theta, alpha, n, h, d, residual, through, threads);                 \
  }                                                                                                \
  void second_moment_##name(const Format::number *Q, const Format::number *V, const float *Y,      \
                            long q, long h, long d, float *out, int threads) {                     \
    second_moment<Format>(Q, V, Y, q, h, d, out, threads);                                         \
  }
LOSS_AND_GRADIENT(bfloat16, Bfloat16)
LOSS_AND_GRADIENT(float32, Float32)

// In 8 bits W is too coarse, since the Y differ much: what rounding leaves of it goes beside it.
void second_moment_int8(const int8_t *Q, const int8_t *V, const float *Y, const float *V_scales,
                        long q, long h, long d, float *out, int threads) {
  pass<Int8>(Q, q, V, 2 * q, out, q, h, d, threads, [&](const auto &here) {
    alignas(64) float w[MOST_CHUNK], y[MOST_CHUNK];
    for (long k = 0; k < here.count; k += LANES) {
      const Part part = first(here.count - k);
      const Lanes scale = load(V_scales + here.begin + k, part);
      store(y + k, multiply(multiply(scale, scale), load(Y + here.begin + k, part)), part);
    }
    for (long i = 0; i < q; i++) {
      Lanes largest = all(0);
      for (long k = 0; k < here.count; k += LANES) {
        const Part part = first(here.count - k);
        const Lanes wide = multiply(load(y + k, part), load(here.u(i) + k, part));
        largest = larger(largest, size(wide));
        store(w + k, wide, part);
      }
      const float most = largest_of(largest), scale = (most > 0 ? most : 1) / 127;
      here.scales[i] = scale;
      here.scales[q + i] = scale / 254; // half a step becomes 127
      for (long k = 0; k < here.count; k += LANES) {
        const Part part = first(here.count - k);
        const Lanes steps = multiply(load(w + k, part), all(1 / scale));
        const Lanes whole = _mm512_roundscale_ps(steps, 0);
        store(here.w(i) + k, whole, part);
        store(here.w(q + i) + k, multiply(_mm512_sub_ps(steps, whole), all(254)), part);
      }
    }
  });
}
}

#endif
