// V panel by panel, 32 rows at once, for the matrix units: A V^T, and chunks of V in the order that
// W V asks for.
//
// A V^T: rows of V are the left tiles, as they lie, and A is brought into the order of right ones
// once. What comes out is transposed, tile by tile.

#pragma once

#include <algorithm>
#include <cstring>

#include "ahead.h"
#include "aligned_memory.h"
#include "matrix_units.h"
#include "transpose.h"

namespace {

// ---- V in the order of right tiles

// A chunk of rows of V: strip by strip of its columns, as wide as a tile's row of V. A register's
// columns lie beside those of the next.
template <class F> class Chunk {
  using number = typename F::number;

public:
  static constexpr int REGISTERS = F::PER_LANE; // of a strip
  const long steps, strips;

  Chunk(long rows, long d)
      : steps(rows / STEP<F>), strips(parts_of(d, STEP<F>)),
        ordered(allocate<int32_t>(strips * steps * REGISTERS * TILE)) {}

  // Takes SIDE rows of a strip, the first of which is the chunk's row `row`.
  void put(const char *V, long apart, long row, long strip) {
    constexpr int LINES = SIDE / F::PER_LANE;
    int32_t *to = at(strip, row / STEP<F>, 0) + row % STEP<F> / F::PER_LANE * SIDE;
    UNROLL for (int k = 0; k < LINES; k++, V += F::PER_LANE * apart, to += SIDE) {
      Register x[F::PER_LANE], lanes[REGISTERS];
      UNROLL for (int j = 0; j < F::PER_LANE; j++) x[j] = load(V + j * apart);
      F::order(x, lanes);
      UNROLL for (int q = 0; q < REGISTERS; q++) store(to + q * TILE, lanes[q]);
    }
  }
  // A column of the strip by the register q and its lane.
  static int column(int q, int lane) { return lane / 4 * 4 * REGISTERS + 4 * q + lane % 4; }

  int32_t *at(long strip, long step, int q) const {
    return ordered.get() + ((strip * steps + step) * REGISTERS + q) * TILE;
  }

private:
  Memory<int32_t> ordered;
};

// A panel of V as tiles read it: full steps where they lie, what is left over in a copy.
template <class F> class Panel {
  using number = typename F::number;

public:
  const long d, full, steps; // along d

  explicit Panel(long d)
      : d(d), full(d / STEP<F>), steps(parts_of(d, STEP<F>)),
        end(allocate<number>(PANEL * STEP<F>)) {}

  // `rows` rows of V, at most PANEL; zeros beyond, whatever W has for them.
  void open(const number *V, long rows) {
    if (rows < PANEL) {
      if (!few) few = allocate<number>(PANEL * d);
      std::memset((void *)few.get(), 0, PANEL * d * sizeof(number));
      std::memcpy((void *)few.get(), V, rows * d * sizeof(number));
      V = few.get();
    }
    begin = (const char *)V;
    if (full == steps) return;
    const long bytes = (d - full * STEP<F>) * sizeof(number);
    for (int k = 0; k < PANEL; k++) {
      store(end.get() + k * STEP<F>, first_bytes(V + k * d + full * STEP<F>, bytes));
    }
  }
  const char *at(long step) const {
    return step < full ? begin + step * ROW_BYTES : (const char *)end.get();
  }
  long apart(long step) const { return step < full ? d * sizeof(number) : ROW_BYTES; }
  // Brings a step of a tile's rows into the order of a chunk, from whose row `row` on the panel is.
  void put(Chunk<F> &chunk, long row, long step, int tile) const {
    const char *rows = at(step) + tile * SIDE * apart(step);
    chunk.put(rows, apart(step), row + tile * SIDE, step);
  }

private:
  Memory<number> end, few;
  const char *begin;
};

// ---- A V^T

// A (m, d) in the order of right tiles: for 16 rows after another, step by step along d.
template <class F> struct Right {
  using number = typename F::number;
  const long m, d, blocks, steps;
  Memory<int32_t> tiles;

  Right(long m, long d)
      : m(m), d(d), blocks(parts_of(m, SIDE)), steps(parts_of(d, STEP<F>)),
        tiles(allocate<int32_t>(blocks * steps * TILE)) {}

  // Called by all threads together.
  void fill(const number *A) {
#pragma omp for schedule(static)
    for (long step = 0; step < steps; step++) {
      const long bytes = (d - step * STEP<F>) * sizeof(number);
      for (long b = 0; b < blocks; b++) {
        alignas(64) int32_t rows[TILE] = {};
        for (long i = 0; i < std::min<long>(SIDE, m - b * SIDE); i++) {
          store(rows + i * SIDE, first_bytes(A + (b * SIDE + i) * d + step * STEP<F>, bytes));
        }
        turn(rows, tiles.get() + (b * steps + step) * TILE);
      }
    }
  }
  const char *at(long block, long step) const {
    return (const char *)(tiles.get() + (block * steps + step) * TILE);
  }
  // Whether what is asked for is still in the cache when all of this has been read.
  bool leaves_room() const { return blocks * steps * TILE * 4 <= 512 << 10; }
};

// Panels of A V^T, on one thread.
template <class F> class Projection {
  using number = typename F::number;

public:
  explicit Projection(const Right<F> &A)
      : A(A), sums(allocate<typename F::sum>(4 * TILE)), panel(A.d) {}

  // Columns 0 .. rows - 1, at most PANEL, of A V^T; the rows of out lie `apart` from one another.
  // The panel goes into a chunk, if there is one, from its row `row` on. Beside the products with
  // all rows of A but the first, which wait for the memory, it asks for the panel that comes next.
  template <class Out>
  void add(const number *V, long rows, Out *out, long apart, Chunk<F> *chunk, long row) {
    panel.open(V, rows);
    Ahead<Cache::SECOND, 4> ahead;
    if (A.leaves_room()) ahead = {V + PANEL * A.d, V + 2 * PANEL * A.d};
    for (long b = 0; b < A.blocks; b += 2) {
      const auto keep = [&](long k, int tile) {
        if (chunk) panel.put(*chunk, row, k, tile);
      };
      const auto leave = [&](long, int) { ahead.ask(); };
      if (b + 1 < A.blocks) {
        b ? multiply<2>(b, leave) : multiply<2>(b, keep);
      } else {
        b ? multiply<1>(b, leave) : multiply<1>(b, keep);
      }
      for (long i = b * SIDE; i < std::min(A.m, (b + 2) * SIDE); i += SIDE) {
        for (int k = 0; k < rows; k += SIDE) {
          const auto *tile = sums.get() + ((k / SIDE) * 2 + i / SIDE - b) * TILE;
          put_columns(tile, out + i * apart + k, apart, A.m - i, first(rows - k));
        }
      }
    }
  }

private:
  template <int RIGHT, class Beside> void multiply(long b, Beside beside) {
    using Here = Sums<F, 2, RIGHT>;
    const long next = A.steps * TILE * 4, full = panel.full;
    const auto ask_too = [&](long step, int tile) {
      if (tile < RIGHT) prefetch_lines<Cache::FIRST, SIDE>(A.at(b + tile, step + 1));
      beside(step, tile);
    };
    Here::clear();
    Here::add(panel.at(0), panel.apart(0), A.at(b, 0), next, 4 * TILE, full, ask_too);
    if (full < A.steps) {
      const auto last = [&](long, int tile) { beside(full, tile); };
      Here::add(panel.at(full), panel.apart(full), A.at(b, full), next, 4 * TILE, 1, last);
    }
    Here::write(sums.get(), 2 * TILE);
  }

  const Right<F> &A;
  Memory<typename F::sum> sums;
  Panel<F> panel;
};

} // namespace
