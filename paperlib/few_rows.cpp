// A V^T and W V for a V of many rows and an A (m, d) or W (m, h) of few, all of them row by row in
// memory. `few_rows.py` compiles this file and says what it is for.
//
// A V^T is made of dot products along d: registers hold the sums of a few rows of A with a few of
// V, and V is read as it lies, so many of its columns at a time that those of A stay in the first
// cache. W V is made of strips of columns some registers wide: a strip of some dozen rows of V is
// brought into the order of its products, in the cache, and used for all rows of W. Both ask for
// what they will need next while they multiply (`_mm_prefetch`).
//
// The sums of a row do not depend on how many other rows, or threads, there are.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "aligned_memory.h"
#include "lanes.h"
#include "product_functions.h"
#include "shares.h"

#ifdef SIXTEEN_LANES
#include "few_rows_avx512.h"
#else
#include "few_rows_avx2.h"
#endif

namespace {

constexpr int PANELS = 4;       // of rows of V, through which A goes together
constexpr int RUN_BYTES = 4096; // of their rows, at a time

constexpr int REGISTERS = 2 * COMBINE_PAIRS; // of a row of ..
constexpr int STRIP = REGISTERS * LANES;     // .. columns of W V that are summed at once
constexpr int CHUNK_STEPS = 32;              // of it in the cache; one product a lane each
constexpr int NEIGHBOURS = 1024 / STRIP;     // strips whose next rows are asked for together

// ---- A V^T

// What becomes of the sums for a run of the numbers along d, four for each row of A.
template <class F, class Out> struct Target {
  bool first, last;       // of the runs
  typename F::sums *sums; // of those before the last
  Out *out;               // after it
  long h;
  const int32_t *offsets;
};

// (ROWS, COLUMNS) of the products; A and V begin at the first of them, where a run of `count` of
// the d numbers does. Of the rows of V that come next, it asks for AHEAD from `next` on.
template <class F, class Out, int ROWS, int COLUMNS, int AHEAD>
void project_block(const typename F::number *A, const typename F::number *V, long d, long count,
                   const Target<F, Out> &to, const typename F::number *next) {
  typename F::sums c[ROWS][4];
  UNROLL for (int i = 0; i < ROWS; i++) {
    UNROLL for (int j = 0; j < 4; j++) {
      c[i][j] = to.first || j >= COLUMNS ? F::zero() : to.sums[4 * i + j];
    }
  }
  constexpr int WIDTH = LANES * F::PER_LANE;
  long k = 0;
  for (; k + WIDTH <= count; k += WIDTH) {
    Register v[COLUMNS];
    UNROLL for (int j = 0; j < COLUMNS; j++) v[j] = F::of_v(load_once(V + j * d + k));
    UNROLL for (int j = 0; j < AHEAD; j++) {
      _mm_prefetch((const char *)(next + j * d + k), _MM_HINT_T1);
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
      const Register a = load_once(A + i * d + k);
      UNROLL for (int j = 0; j < COLUMNS; j++) c[i][j] = F::add_product(c[i][j], v[j], a);
    }
  }
  if (k < count) {
    Register v[COLUMNS];
    UNROLL for (int j = 0; j < COLUMNS; j++) v[j] = F::of_v(F::first(V + j * d + k, count - k));
    UNROLL for (int i = 0; i < ROWS; i++) {
      const Register a = F::first(A + i * d + k, count - k);
      UNROLL for (int j = 0; j < COLUMNS; j++) c[i][j] = F::add_product(c[i][j], v[j], a);
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) {
    if (to.last) {
      const auto found = totals(c[i][0], c[i][1], c[i][2], c[i][3], to.offsets[i]);
      put(to.out + i * to.h, found, COLUMNS);
    } else {
      UNROLL for (int j = 0; j < COLUMNS; j++) to.sums[4 * i + j] = c[i][j];
    }
  }
}

template <class F, class Out> using ProjectBlock = decltype(&project_block<F, Out, 1, 1, 0>);

template <class F, class Out, int ROWS, int COLUMNS = PROJECT_COLUMNS>
ProjectBlock<F, Out> project_block_of(int columns, int ahead) {
  if constexpr (COLUMNS == PROJECT_COLUMNS) {
    if (columns == COLUMNS && ahead == 1) return project_block<F, Out, ROWS, COLUMNS, 1>;
    if (columns == COLUMNS && ahead == 2) return project_block<F, Out, ROWS, COLUMNS, 2>;
    if (columns == COLUMNS && ahead) return project_block<F, Out, ROWS, COLUMNS, COLUMNS>;
  }
  if constexpr (COLUMNS > 1) {
    if (columns < COLUMNS) return project_block_of<F, Out, ROWS, COLUMNS - 1>(columns, 0);
  }
  return project_block<F, Out, ROWS, COLUMNS, 0>;
}

template <class F, class Out, int ROWS = PROJECT_ROWS>
ProjectBlock<F, Out> project_block_of(int rows, int columns, int ahead) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return project_block_of<F, Out, ROWS - 1>(rows, columns, ahead);
  }
  return project_block_of<F, Out, ROWS>(columns, ahead);
}

template <class F, class Out>
void project(const typename F::number *A, const typename F::number *V, Out *out, long m, long h,
             long d, int threads) {
  auto offsets = allocate<int32_t>(m);
  for (long i = 0; i < m; i++) offsets[i] = F::offset(A + i * d, d);
  constexpr long GROUP = PANELS * PROJECT_COLUMNS, RUN = RUN_BYTES / sizeof(*V);
  const long blocks = (m + PROJECT_ROWS - 1) / PROJECT_ROWS;
  const long groups = (h + GROUP - 1) / GROUP;
  // The memory gives what comes next more slowly than one block could ask for it.
  const int share = blocks >= 4 ? 1 : blocks >= 2 ? 2 : PROJECT_COLUMNS;
#pragma omp parallel num_threads(threads)
  {
    auto sums = allocate<typename F::sums>(m * PANELS * 4);
#pragma omp for schedule(static)
    for (long group = 0; group < groups; group++) {
      const long begin = group * GROUP, end = std::min(h, begin + GROUP);
      for (long k = 0; k < d; k += RUN) {
        const long count = std::min(RUN, d - k);
        auto *so_far = sums.get();
        for (long b = 0; b < blocks; b++) {
          const long i = begin_of(b, m, blocks);
          const int rows = begin_of(b + 1, m, blocks) - i;
          const int ahead = b * share < PROJECT_COLUMNS ? share : 0;
          for (long j = begin; j < end; j += PROJECT_COLUMNS, so_far += 4 * rows) {
            const int columns = std::min<long>(PROJECT_COLUMNS, end - j);
            const Target<F, Out> to{k == 0, k + RUN >= d, so_far, out + i * h + j, h,
                                    offsets.get() + i};
            project_block_of<F, Out>(rows, columns, ahead)(
                A + i * d + k, V + j * d + k, d, count, to, V + (j + GROUP + b * share) * d + k);
          }
        }
      }
    }
  }
}

// ---- W V

// Copies what there is of a strip at the end of V; zeros fill up the rest.
template <class F>
void copy_strip(const typename F::number *V, long d, int rows, int columns,
                typename F::number *to) {
  std::memset(to, 0, CHUNK_STEPS * F::PER_LANE * STRIP * sizeof(typename F::number));
  for (int row = 0; row < rows; row++) {
    std::memcpy(to + row * STRIP, V + row * d, columns * sizeof(typename F::number));
  }
}

// Adds the products of ROWS rows of W with a strip to their sums. The FIRST block of rows brings
// the strip into order. Before every so many steps a block asks for the rows of V of one, of those
// that come next.
template <class F, int ROWS, bool FIRST>
void combine_block(const int32_t *W, const typename F::number *V, long d, int steps,
                   typename F::number *strip, typename F::sums *sums,
                   const typename F::number *next, long next_d, int every) {
  constexpr int NUMBERS = F::PER_LANE * LANES;
  typename F::sums c[ROWS][REGISTERS];
  UNROLL for (int i = 0; i < ROWS; i++) {
    UNROLL for (int q = 0; q < REGISTERS; q++) c[i][q] = F::zero();
  }
  for (int step = 0; step < steps;) {
    UNROLL for (int k = 0; k < F::PER_LANE; k++, next += next_d) {
      UNROLL for (int q = 0; q < STRIP * sizeof(*V); q += 64) {
        _mm_prefetch((const char *)next + q, _MM_HINT_T1);
      }
    }
    for (const int end = std::min(steps, step + every); step < end; step++) {
      Register v[REGISTERS];
      if (FIRST) {
        UNROLL for (int q = 0; q < REGISTERS; q += 2) F::order(V + q * LANES, d, v[q], v[q + 1]);
        UNROLL for (int q = 0; q < REGISTERS; q++) store(strip + q * NUMBERS, v[q]);
      } else {
        UNROLL for (int q = 0; q < REGISTERS; q++) v[q] = load(strip + q * NUMBERS);
      }
      UNROLL for (int i = 0; i < ROWS; i++) {
        const Register w = broadcast(W[i]);
        UNROLL for (int q = 0; q < REGISTERS; q++) c[i][q] = F::add_product(c[i][q], v[q], w);
      }
      V += F::PER_LANE * d, strip += F::PER_LANE * STRIP, W += ROWS;
    }
  }
  // Sums of sums lose fewer digits than one long sum.
  UNROLL for (int i = 0; i < ROWS; i++) {
    UNROLL for (int q = 0; q < REGISTERS; q++, sums++) *sums = F::add(*sums, c[i][q]);
  }
}

template <class F> using CombineBlock = decltype(&combine_block<F, 1, false>);

template <class F, int ROWS = COMBINE_ROWS> CombineBlock<F> combine_block_of(int rows, bool first) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return combine_block_of<F, ROWS - 1>(rows, first);
  }
  return first ? combine_block<F, ROWS, true> : combine_block<F, ROWS, false>;
}

// W as its products ask for it: the rows of a block side by side, group by group of its columns.
template <class F>
void order_rows(const typename F::number *W, long m, long h, long blocks, int32_t *ordered,
                int32_t *offsets) {
  const long full = h / F::PER_LANE, groups = (h + F::PER_LANE - 1) / F::PER_LANE;
#pragma omp for schedule(static)
  for (long i = 0; i < m; i++) {
    long block = i * blocks / m;
    while (begin_of(block + 1, m, blocks) <= i) block++;
    const long begin = begin_of(block, m, blocks), rows = begin_of(block + 1, m, blocks) - begin;
    const typename F::number *from = W + i * h;
    int32_t *to = ordered + begin * groups + i - begin;
    for (long g = 0; g < full; g++) std::memcpy(to + g * rows, from + g * F::PER_LANE, 4);
    if (full < groups) {
      int32_t last = 0;
      std::memcpy(&last, from + full * F::PER_LANE, (h % F::PER_LANE) * sizeof(*from));
      to[full * rows] = last;
    }
    offsets[i] = F::offset(from, h);
  }
}

// The sums of a row for a strip, as they lie in registers, into the columns that there are.
template <class F>
void put_strip(const typename F::sums *sums, int32_t offset, float *out, int columns) {
  alignas(64) float found[2 * LANES], line[STRIP];
  for (int pair = 0; pair < STRIP; pair += 2 * LANES, sums += 2) {
    F::write(found, sums[0], offset);
    F::write(found + LANES, sums[1], offset);
    for (int k = 0; k < LANES / 2; k++) std::memcpy(line + pair + F::ORDER[k], found + 4 * k, 16);
  }
  std::memcpy(out, line, columns * sizeof(float));
}

template <class F>
void combine(const typename F::number *W, const typename F::number *V, float *out, long m, long h,
             long d, int threads) {
  using number = typename F::number;
  constexpr int CHUNK = CHUNK_STEPS * F::PER_LANE;
  const long groups = (h + F::PER_LANE - 1) / F::PER_LANE;
  const long blocks = (m + COMBINE_ROWS - 1) / COMBINE_ROWS;
  const long strips = (d + STRIP - 1) / STRIP;
  const long parts = threads * ((strips + NEIGHBOURS * threads - 1) / (NEIGHBOURS * threads));
  auto ordered = allocate<int32_t>(groups * m);
  auto offsets = allocate<int32_t>(m);
#pragma omp parallel num_threads(threads)
  {
    order_rows<F>(W, m, h, blocks, ordered.get(), offsets.get());
    auto strip = allocate<number>(CHUNK * STRIP), end = allocate<number>(CHUNK * STRIP);
    auto sums = allocate<typename F::sums>(m * REGISTERS * NEIGHBOURS);
#pragma omp for schedule(static)
    for (long part = 0; part < parts; part++) {
      const long first = begin_of(part, strips, parts);
      const long count = begin_of(part + 1, strips, parts) - first;
      std::fill_n(sums.get(), m * REGISTERS * count, F::zero());
      for (long row = 0; row < h; row += CHUNK) {
        const int rows = std::min<long>(CHUNK, h - row);
        const int steps = (rows + F::PER_LANE - 1) / F::PER_LANE;
        for (long s = 0; s < count; s++) {
          const long column = (first + s) * STRIP, columns = std::min<long>(STRIP, d - column);
          const number *here = V + row * d + column;
          // The rows below, or those of the next strips from the top.
          const bool below = row + CHUNK < h;
          const number *next = below ? here + CHUNK * d : V + column + count * STRIP;
          long apart = d;
          if (columns < STRIP || rows % F::PER_LANE) {
            copy_strip<F>(here, d, rows, columns, end.get());
            here = end.get(), apart = STRIP;
          }
          for (long b = 0; b < blocks; b++) {
            const long begin = begin_of(b, m, blocks);
            const int height = begin_of(b + 1, m, blocks) - begin;
            combine_block_of<F>(height, b == 0)(
                ordered.get() + begin * groups + row / F::PER_LANE * height, here, apart, steps,
                strip.get(), sums.get() + REGISTERS * (s * m + begin),
                next + begin_of(b, CHUNK_STEPS, blocks) * F::PER_LANE * d, d, blocks);
          }
        }
      }
      for (long s = 0; s < count; s++) {
        const long column = (first + s) * STRIP, columns = std::min<long>(STRIP, d - column);
        for (long i = 0; i < m; i++) {
          put_strip<F>(sums.get() + REGISTERS * (s * m + i), offsets[i], out + i * d + column,
                       columns);
        }
      }
    }
  }
}

} // namespace

// Sizes: A (m, d), W (m, h), V (h, d); what is returned is float32, but A V^T of bfloat16.
extern "C" {
PRODUCTS(float32, Float32, float)
#if defined(SIXTEEN_LANES) && defined(__AVX512BF16__)
PRODUCTS(bfloat16, Bfloat16, uint16_t)
#endif
#if defined(SIXTEEN_LANES) && defined(__AVX512VNNI__)
PRODUCTS(int8, Int8, float)
#endif
}
