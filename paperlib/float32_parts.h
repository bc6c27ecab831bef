// float32 on matrix units that multiply bfloat16: a number is the sum of three of those.
//
// Cut off after 8 digits, x leaves a remainder that is exact, and so does that one; the 8 digits
// after those are the last there are. Of the nine products of the parts of two numbers the three
// smallest are below the rounding of float32, and left out. A number of float16 has two parts. So
// have the numbers that are multiplied with it, and of those four products the smallest is left
// out, too: what it would add is far below what rounding to float16 took away.

#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "aligned_memory.h"
#include "matrix_units.h"
#include "transpose.h"

namespace {

constexpr int PARTS = 3;
template <class Number>
constexpr int PARTS_OF = std::is_same_v<Number, Bfloat16Number>  ? 1
                         : std::is_same_v<Number, Float16Number> ? 2
                                                                 : PARTS;
constexpr int WIDTH = 2 * SIDE; // of two tiles side by side
template <int COUNT> constexpr int PAIR_OF = 2 * COUNT * TILE; // part by part
constexpr int NUMBERS = STEP<Bfloat16>; // in a step along the sums
constexpr int RUN = 3;                  // steps for which a piece of V is at hand

// ---- parts

inline Lanes leading_digits(Lanes a) {
  const Register mask = broadcast(0xffff0000);
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), mask));
}
// Those of a and of b, as bfloat16 in the lower and the upper halves of the lanes. A permutation
// would do it at once, in the very port that gives the matrix units their work.
inline Register side_by_side(Lanes a, Lanes b) {
  constexpr __mmask32 UPPER_HALVES = 0xaaaaaaaa;
  const Register low = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
  return _mm512_mask_blend_epi16(UPPER_HALVES, low, _mm512_castps_si512(b));
}
// A line of the parts of a tile: 16 numbers, each beside one that is summed with it.
template <int COUNT = PARTS> inline void split(Lanes a, Lanes b, int32_t *to) {
  UNROLL for (int part = 0; part < COUNT; part++, to += 2 * TILE) {
    store(to, side_by_side(a, b));
    a = _mm512_sub_ps(a, leading_digits(a));
    b = _mm512_sub_ps(b, leading_digits(b));
  }
}

// ---- products

// The parts of the left and of the right tiles that are multiplied, so that from one product to the
// next only one of both has to be loaded.
struct Slot {
  int left, right;
};
template <int COUNT> struct Slots;
template <> struct Slots<1> {
  static constexpr Slot SLOT[] = {{0, 0}};
};
template <> struct Slots<3> {
  static constexpr Slot SLOT[] = {{0, 2}, {0, 1}, {1, 1}, {1, 0}, {0, 0}, {2, 0}};
};
template <> struct Slots<2> {
  static constexpr Slot SLOT[] = {{0, 1}, {0, 0}, {1, 0}};
};

// Adds a step of products to the sums of LEFT by RIGHT tiles, which are in their registers.
// `beside(slot)` is called after each product.
template <int LEFT, int RIGHT, int COUNT, class Beside>
void add_step(const int32_t *left, const int32_t *right, Beside beside) {
  using S = Slots<COUNT>;
  // The intrinsics take the numbers of tiles as they are written.
  UNROLL for (int k = 0; k < std::size(S::SLOT); k++) {
    if (k == 0 || S::SLOT[k].left != S::SLOT[k - 1].left) {
      const int32_t *tiles = left + S::SLOT[k].left * 2 * TILE;
      _tile_loadd(4, tiles, ROW_BYTES);
      if constexpr (LEFT == 2) _tile_loadd(5, tiles + TILE, ROW_BYTES);
    }
    if (k == 0 || S::SLOT[k].right != S::SLOT[k - 1].right) {
      const int32_t *tiles = right + S::SLOT[k].right * 2 * TILE;
      _tile_loadd(6, tiles, ROW_BYTES);
      if constexpr (RIGHT == 2) _tile_loadd(7, tiles + TILE, ROW_BYTES);
    }
    Bfloat16::multiply<LEFT, RIGHT>();
    beside(k);
  }
}

// Steps of products, added to sums in memory.
template <int LEFT, int RIGHT, int COUNT, class Left, class Right, class Beside>
void add_steps(Left left, Right right, int steps, float *sums, Beside beside) {
  Sums<Bfloat16, LEFT, RIGHT>::read(sums, 2 * TILE);
  for (int k = 0; k < steps; k++) {
    add_step<LEFT, RIGHT, COUNT>(left(k), right(k), [&](int slot) { beside(k, slot); });
  }
  Sums<Bfloat16, LEFT, RIGHT>::write(sums, 2 * TILE);
}

// Sums of sums lose fewer digits than one long sum.
template <int TILES> void add_tiles(const float *found, float *sums) {
  for (int k = 0; k < TILES * TILE; k += SIDE) {
    const Lanes more = _mm512_load_ps(found + k);
    _mm512_store_ps(sums + k, _mm512_add_ps(_mm512_load_ps(sums + k), more));
  }
}

// ---- the factor of few rows

// m rows of some length in parts: run by run, and there one pair of tiles after another. Right
// tiles have them as columns.
template <bool RIGHT, int COUNT = PARTS> class FewRows {
public:
  static constexpr int PAIR = PAIR_OF<COUNT>;
  const long m, length, pairs, steps, runs;

  FewRows(long m, long length)
      : m(m), length(length), pairs(parts_of(m, WIDTH)), steps(parts_of(length, NUMBERS)),
        runs(parts_of(steps, RUN)), parts(allocate<int32_t>(pairs * steps * PAIR)) {}

  int steps_of(long run) const { return std::min<long>(RUN, steps - run * RUN); }
  bool two_tiles(long pair) const { return m - pair * WIDTH > SIDE; }
  int32_t *at(long run, long pair) const {
    return parts.get() + (run * RUN * pairs + pair * steps_of(run)) * PAIR;
  }
  // Called by all threads together.
  void fill(const float *rows) {
#pragma omp for schedule(static)
    for (long step = 0; step < steps; step++) {
      const long begin = step * NUMBERS, count = length - begin;
      const Part low = first(count), high = first(std::max<long>(0, count - SIDE));
      for (long i = 0; i < pairs * WIDTH; i += SIDE) {
        alignas(64) int32_t lines[PAIR];
        for (int k = 0; k < SIDE; k++) {
          const float *row = rows + (i + k) * length + begin;
          const bool there = i + k < m;
          split<COUNT>(there ? load(row, low) : all(0), there ? load(row + SIDE, high) : all(0),
                       lines + k * SIDE);
        }
        int32_t *to = at(step / RUN, i / WIDTH) + step % RUN * PAIR + i % WIDTH / SIDE * TILE;
        for (int part = 0; part < COUNT; part++) put(lines + part * 2 * TILE, to + part * 2 * TILE);
      }
    }
  }

private:
  static void put(const int32_t *lines, int32_t *tile) {
    RIGHT ? turn(lines, tile) : (void)std::memcpy(tile, lines, TILE * sizeof(*tile));
  }

  Memory<int32_t> parts;
};

} // namespace
