// The products of `few_rows.cpp` on the matrix units of a processor. `matrix_units.py` compiles
// this file and says what it is for.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "combination.h"

namespace {

template <class F, class Out>
void project(const typename F::number *A, const typename F::number *V, Out *out, long m, long h,
             long d, int threads) {
  Right<F> right(m, d);
#pragma omp parallel num_threads(threads)
  {
    right.fill(A);
    Units units;
    Projection<F> projection(right);
#pragma omp for schedule(static)
    for (long k = 0; k < h; k += PANEL) {
      projection.add(V + k * d, std::min<long>(PANEL, h - k), out + k, h, nullptr, 0);
    }
  }
}

template <class F>
void combine(const typename F::number *W, const typename F::number *V, float *out, long m, long h,
             long d, int threads) {
  using number = typename F::number;
  using Mine = Combination<F, typename F::sum>;
  const long chunk = chunk_rows<F>(m, h, d, threads);
  Mine *all_sums[MOST_THREADS] = {};
  std::memset(out, 0, m * d * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    Units units;
    Mine mine(m, d, chunk);
    all_sums[omp_get_thread_num()] = &mine;
    Panel<F> panel(d);
    auto left = zeros<number>(mine.blocks * SIDE * chunk);
#pragma omp for schedule(static)
    for (long k = 0; k < h; k += chunk) {
      const long rows = std::min(chunk, h - k);
      for (long i = 0; i < m; i++) {
        std::memcpy((void *)(left.get() + i * chunk), W + i * h + k, rows * sizeof(number));
      }
      for (long j = 0; j < parts_of(rows, STEP<F>) * STEP<F>; j += PANEL) {
        panel.open(V + (k + j) * d, std::clamp<long>(rows - j, 0, PANEL));
        for (long s = 0; s < panel.steps; s++) {
          for (int row = 0; row < PANEL; row += SIDE) {
            mine.V.put(panel.at(s) + row * panel.apart(s), panel.apart(s), j + row, s);
          }
        }
      }
      mine.add(left.get(), nullptr, rows);
    }
    add_up(all_sums, omp_get_num_threads(), out, m);
  }
}

} // namespace

extern "C" {
// Whether the system lets this process use the units; 18 is their data among what it saves.
int allowed(int) {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, 18) == 0;
}

// Sizes: A (m, d), W (m, h), V (h, d). What is returned is float32, but A V^T of bfloat16.
void project_bfloat16(const Bfloat16Number *A, const Bfloat16Number *V, Bfloat16Number *out, long m,
                      long h, long d, int threads) {
  project<Bfloat16>(A, V, out, m, h, d, threads);
}
void project_int8(const int8_t *A, const int8_t *V, float *out, long m, long h, long d,
                  int threads) {
  project<Int8>(A, V, out, m, h, d, threads);
}
void combine_bfloat16(const Bfloat16Number *W, const Bfloat16Number *V, float *out, long m, long h,
                      long d, int threads) {
  combine<Bfloat16>(W, V, out, m, h, d, threads);
}
void combine_int8(const int8_t *W, const int8_t *V, float *out, long m, long h, long d,
                  int threads) {
  combine<Int8>(W, V, out, m, h, d, threads);
}
}

#endif
