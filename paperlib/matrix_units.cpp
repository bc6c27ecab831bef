// The products of `few_rows.cpp` on the matrix units of a processor. `matrix_units.py` compiles
// this file and says what it is for.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "combination.h"
#include "product_functions.h"

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
  std::memset(out, 0, m * d * sizeof(float));
  add_chunks<F, typename F::sum>(m, out, m, h, d, threads, [&](long) {
    return [&, panel = Panel<F>(d)](const Work<F> &here) mutable {
      for (long i = 0; i < m; i++) {
        std::memcpy((void *)here.w(i), W + i * h + here.begin, here.count * sizeof(*W));
      }
      for (long k = 0; k < rounded_up(here.count, STEP<F>); k += PANEL) {
        panel.open(V + (here.begin + k) * d, std::clamp<long>(here.count - k, 0, PANEL));
        for (long step = 0; step < panel.steps; step++) {
          for (int tile = 0; tile < PANEL / SIDE; tile++) panel.put(here.V, k, step, tile);
        }
      }
    };
  });
}

} // namespace

extern "C" {
// Whether the system lets this process use the units; 18 is their data among what it saves.
int allowed(int) {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, 18) == 0;
}

// Sizes: A (m, d), W (m, h), V (h, d). What is returned is float32, but A V^T of bfloat16.
PRODUCTS(bfloat16, Bfloat16, Bfloat16Number)
PRODUCTS(int8, Int8, float)
}

#endif
