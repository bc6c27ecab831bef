// What lies between the two products of a pass: U = dX V^T and dw V^T in, W for W V out.
// `between_products.py` compiles this file and says what it is for.

#include "aligned_memory.h"
#include "between_products.h"

namespace {

template <class Number, class Activations, class Out>
void turn(const Number *U, const Activations &at, const Step &step, long h, Out *W,
          float *W_scales, float *Ha, int threads) {
  const long padded = (h + LANES - 1) / LANES * LANES;
  const auto memory = allocate<float>(2 * padded);
  float *T = memory.get(), *back = step.scales ? T + padded : T;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (long k = 0; k < padded; k += LANES) sum_over_samples(U, h, at, step, k, h, T, back);
#pragma omp for schedule(static)
    for (long i = 0; i < step.rows; i++) {
      const float sum = turn_row(at, step, i, T, back, W + i * h, W_scales + i, h);
      if (i < step.n) Ha[i] = sum;
    }
  }
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
    turn(U, at, {alpha, da, linear, scales, n, rows}, h, W, W_scales, Ha, threads);                \
  }
#define TURN_TWO_SLOPES(name, Number, Inputs, Out)                                                 \
  void turn_two_slopes_##name(const Number *U, const Inputs *inputs, long apart, float left,       \
                              float right, const float *alpha, const float *da, float linear,      \
                              const float *scales, long n, long rows, long h, Out *W,              \
                              float *W_scales, float *Ha, int threads) {                           \
    const TwoSlopes<Inputs> at{inputs, apart, left, right};                                        \
    turn(U, at, {alpha, da, linear, scales, n, rows}, h, W, W_scales, Ha, threads);                \
  }
TURN(float32, float, float)
TURN_TWO_SLOPES(float32_float32, float, float, float)
TURN_TWO_SLOPES(float32_float16, float, Float16Number, float)
#if defined(SIXTEEN_LANES) && defined(__AVX512BF16__)
TURN(bfloat16, Bfloat16Number, Bfloat16Number)
TURN_TWO_SLOPES(bfloat16_bfloat16, Bfloat16Number, Bfloat16Number, Bfloat16Number)
#endif
TURN(int8, float, int8_t)
TURN_TWO_SLOPES(int8_float32, float, float, int8_t)
TURN_TWO_SLOPES(int8_float16, float, Float16Number, int8_t)
}
