// Both products of a pass in float32 in parts, 32 rows of V after another, on one thread.
//
// The rows are split twice, for A V^T as left tiles and for W V as right ones: while one step is
// multiplied the next one is split, in the first cache, and the rows that come after these are
// asked for, so that memory, units and vector instructions work side by side.

#pragma once

#include "float32_pieces.h"

namespace {

// Lines of the cache that are asked for beside a product. A step reads two for each row of V; both
// products go through the same rows, so each has half of them to ask for.
constexpr int LINES_ASKED = parts_of(TURNS * LINES, std::size(Slots<PARTS>::SLOT));

class Float32Pass {
public:
  const long m, d;

  // For A in parts and m rows of W, at most 32 of each: of more the sums would fill the cache.
  Float32Pass(const FewRows<true> &A, long m, const float *V, long h, long d)
      : m(m), d(d), A(A), h(h), V(V), rows(V, h, d), columns(V, h, d),
        ring(allocate<int32_t>(RING * PAIR)), W(zeros<int32_t>(PAIR)),
        sums(allocate<float>(4 * TILE)), totals(zeros<float>(columns.count * 4 * TILE)) {}

  // Asks for the panel after this one, if it lies before `end`, in the course of both products.
  void ask_after(long panel, long end) {
    const auto row = [&](long k) { return V + std::min(h, k * WIDTH) * d; };
    ahead = {row(panel + 1), row(std::min(panel + 2, end))};
  }

  // A V^T for rows 32 panel, .. of V, of which there are `count`: rows of out lie `apart`.
  void project(long panel, long count, float *out, long apart) {
    for (int turn = 0; turn < TURNS; turn++) rows.split_lines(panel, 0, turn, in_ring(0));
    A.m > SIDE ? project<2>(panel) : project<1>(panel);
    for (long i = 0; i < A.m; i += SIDE) {
      for (long k = 0; k < count; k += SIDE) {
        const float *tile = sums.get() + (k / SIDE * 2 + i / SIDE) * TILE;
        put_columns(tile, out + i * apart + k, apart, A.m - i, first(count - k));
      }
    }
  }

  // Adds W V for the same rows, from W whose rows lie `apart`.
  void combine(long panel, long count, const float *from, long apart) {
    const Part low = first(count), high = first(std::max<long>(0, count - SIDE));
    for (long i = 0; i < m; i++, from += apart) {
      split(load(from, low), load(from + SIDE, high), W.get() + i * SIDE);
    }
    for (int turn = 0; turn < TURNS; turn++) columns.split_lines(0, panel, turn, in_ring(0));
    m > SIDE ? combine<2>(panel) : combine<1>(panel);
  }

  // Adds the sums of W V for row i.
  void add_to(float *out, long i) const {
    const float *line = totals.get() + (i / SIDE * 2) * TILE + i % SIDE * SIDE;
    for (long k = 0; k < d; k += SIDE) {
      const Part part = first(d - k);
      const Lanes more = load(line + (k / WIDTH * 4 + k % WIDTH / SIDE) * TILE, part);
      store(out + k, _mm512_add_ps(load(out + k, part), more), part);
    }
  }

private:
  static constexpr int RING = 2, PAIR = PAIR_OF<PARTS>;
  int32_t *in_ring(long k) const { return ring.get() + k % RING * PAIR; }

  template <int RIGHT> void project(long panel) {
    using Here = Sums<Bfloat16, 2, RIGHT>;
    Here::clear();
    settle();
    for (long step = 0; step < A.steps; step++) {
      const int32_t *right = A.at(step / RUN, 0) + step % RUN * PAIR;
      add_step<2, RIGHT, PARTS>(in_ring(step), right, [&](int slot) {
        if (slot < TURNS && step + 1 < A.steps) {
          rows.split_lines(panel, step + 1, slot, in_ring(step + 1));
        }
        ahead.ask();
      });
    }
    Here::write(sums.get(), 2 * TILE);
  }
  template <int LEFT> void combine(long panel) {
    using Here = Sums<Bfloat16, LEFT, 2>;
    float *to = totals.get();
    for (long strip = 0; strip < columns.count; strip++, to += 4 * TILE) {
      Here::clear();
      settle();
      add_step<LEFT, 2, PARTS>(W.get(), in_ring(strip), [&](int slot) {
        if (slot < TURNS && strip + 1 < columns.count) {
          columns.split_lines(strip + 1, panel, slot, in_ring(strip + 1));
        }
        ahead.ask();
      });
      Here::write(sums.get(), 2 * TILE);
      add_tiles<LEFT * 2>(sums.get(), to);
    }
  }

  const FewRows<true> &A;
  const long h;
  const float *V;
  const Pieces<true, float> rows;
  const Pieces<false, float> columns;
  Memory<int32_t> ring, W;
  Memory<float> sums, totals;
  Ahead<Cache::SECOND, LINES_ASKED> ahead;
};

} // namespace
