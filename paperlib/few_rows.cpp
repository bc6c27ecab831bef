// A V^T and W V for a V of many rows and an A (m, d) or W (m, h) of few, all of them row by row in
// memory. `few_rows.py` compiles this file and says what it is for.
//
// A V^T is made of dot products along d: registers hold the sums of a few rows of A with a few of
// V, and V is read as it lies. W V is made of strips of columns two registers wide: a strip of some
// hundred rows of V is brought into the order of its products, in the cache, and used for all rows
// of W. Both ask for what they will need next while they multiply (`_mm_prefetch`).
//
// The sums of a row do not depend on how many other rows, or threads, there are.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "aligned_memory.h"
#include "product_functions.h"
#include "shares.h"

#ifdef __AVX512F__
#include "few_rows_avx512.h"
#else
#include "few_rows_avx2.h"
#endif

namespace {

constexpr int STRIP = 2 * LANES; // columns of W V that are summed at once
constexpr int CHUNK_STEPS = 128; // of the strip in the cache; a step is one product a lane
constexpr int NEIGHBOURS = 4;    // strips whose next rows are asked for together

// ---- A V^T

// (ROWS, COLUMNS) of the products; A and V begin at the first of them. Of the rows of V that come
// next, it asks for AHEAD from `next` on.
template <class F, class Out, int ROWS, int COLUMNS, int AHEAD>
void project_block(const typename F::number *A, const typename F::number *V, long d, Out *out,
                   long h, const int32_t *offsets, const typename F::number *next) {
  typename F::sums c[ROWS][4];
  UNROLL for (int i = 0; i < ROWS; i++) {
    UNROLL for (int j = 0; j < 4; j++) c[i][j] = F::zero();
  }
  constexpr int WIDTH = LANES * F::PER_LANE;
  long k = 0;
  for (; k + WIDTH <= d; k += WIDTH) {
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
  if (k < d) {
    Register v[COLUMNS];
    UNROLL for (int j = 0; j < COLUMNS; j++) v[j] = F::of_v(F::first(V + j * d + k, d - k));
    UNROLL for (int i = 0; i < ROWS; i++) {
      const Register a = F::first(A + i * d + k, d - k);
      UNROLL for (int j = 0; j < COLUMNS; j++) c[i][j] = F::add_product(c[i][j], v[j], a);
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) {
    put(out + i * h, totals(c[i][0], c[i][1], c[i][2], c[i][3], offsets[i]), COLUMNS);
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
  const long blocks = (m + PROJECT_ROWS - 1) / PROJECT_ROWS;
  const long panels = (h + PROJECT_COLUMNS - 1) / PROJECT_COLUMNS;
  // The memory gives what comes next more slowly than one block could ask for it.
  const int share = blocks >= 4 ? 1 : blocks >= 2 ? 2 : PROJECT_COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long panel = 0; panel < panels; panel++) {
    const long j = panel * PROJECT_COLUMNS;
    const int columns = std::min<long>(PROJECT_COLUMNS, h - j);
    for (long b = 0; b < blocks; b++) {
      const long i = begin_of(b, m, blocks);
      const int rows = begin_of(b + 1, m, blocks) - i;
      const int ahead = b * share < PROJECT_COLUMNS ? share : 0;
      project_block_of<F, Out>(rows, columns, ahead)(A + i * d, V + j * d, d, out + i * h + j, h,
                                                     offsets.get() + i,
                                                     V + (j + PROJECT_COLUMNS + b * share) * d);
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

// Adds the products of ROWS rows of W with a strip to their sums, two registers a row. The FIRST
// block of rows brings the strip into order, and asks for the rows of V that come next.
template <class F, int ROWS, bool FIRST>
void combine_block(const int32_t *W, const typename F::number *V, long d, int steps,
                   typename F::number *strip, typename F::sums *sums,
                   const typename F::number *next, long next_d) {
  typename F::sums c[ROWS][2];
  UNROLL for (int i = 0; i < ROWS; i++) c[i][0] = c[i][1] = F::zero();
  for (int s = 0; s < steps; s++, strip += F::PER_LANE * STRIP, W += ROWS) {
    Register v, u;
    if (FIRST) {
      F::order(V, d, v, u);
      store(strip, v);
      store(strip + F::PER_LANE * LANES, u);
      V += F::PER_LANE * d;
      UNROLL for (int k = 0; k < F::PER_LANE; k++, next += next_d) {
        _mm_prefetch((const char *)next, _MM_HINT_T1);
        if (sizeof(typename F::number) * STRIP > 64) {
          _mm_prefetch((const char *)next + 64, _MM_HINT_T1);
        }
      }
    } else {
      v = load(strip);
      u = load(strip + F::PER_LANE * LANES);
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
      const Register w = broadcast(W[i]);
      c[i][0] = F::add_product(c[i][0], v, w);
      c[i][1] = F::add_product(c[i][1], u, w);
    }
  }
  // Sums of sums lose fewer digits than one long sum.
  UNROLL for (int i = 0; i < ROWS; i++) {
    sums[2 * i] = F::add(sums[2 * i], c[i][0]);
    sums[2 * i + 1] = F::add(sums[2 * i + 1], c[i][1]);
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

// The sums of a row for a strip, as they lie in two registers, into the columns that there are.
template <class F>
void put_strip(const typename F::sums *sums, int32_t offset, float *out, int columns) {
  alignas(64) float found[STRIP], line[STRIP];
  F::write(found, sums[0], offset);
  F::write(found + LANES, sums[1], offset);
  for (int k = 0; k < STRIP / 4; k++) std::memcpy(line + F::ORDER[k], found + 4 * k, 16);
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
    auto sums = allocate<typename F::sums>(m * 2 * NEIGHBOURS);
#pragma omp for schedule(static)
    for (long part = 0; part < parts; part++) {
      const long first = begin_of(part, strips, parts);
      const long count = begin_of(part + 1, strips, parts) - first;
      std::fill_n(sums.get(), m * 2 * count, F::zero());
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
                strip.get(), sums.get() + 2 * (s * m + begin), next, d);
          }
        }
      }
      for (long s = 0; s < count; s++) {
        const long column = (first + s) * STRIP, columns = std::min<long>(STRIP, d - column);
        for (long i = 0; i < m; i++) {
          put_strip<F>(sums.get() + 2 * (s * m + i), offsets[i], out + i * d + column, columns);
        }
      }
    }
  }
}

} // namespace

// Sizes: A (m, d), W (m, h), V (h, d); what is returned is float32, but A V^T of bfloat16.
extern "C" {
PRODUCTS(float32, Float32, float)
#ifdef __AVX512BF16__
PRODUCTS(bfloat16, Bfloat16, uint16_t)
#endif
#ifdef __AVX512VNNI__
PRODUCTS(int8, Int8, float)
#endif
}
