// V in parts, piece by piece: 32 of its rows for A V^T, or 32 of its columns for W V, and of these
// a step along the sums at a time.

#pragma once

#include "ahead.h"
#include "float32_parts.h"

namespace {

constexpr int LINES = 8;                // that are split at once, ..
constexpr int TURNS = 2 * SIDE / LINES; // .. of a step

// V as left tiles, its rows across the sums, or as right ones, its columns across them.
template <bool LEFT, class Number> class Pieces {
public:
  const long count;

  Pieces(const Number *V, long h, long d)
      : count(parts_of(LEFT ? h : d, WIDTH)), V(V), h(h), d(d) {}

  // Splits LINES of a step: 32 numbers of a row each, or 16 of two rows.
  void split_lines(long piece, long step, int turn, int32_t *to) const {
    const long along = step * NUMBERS, across = piece * WIDTH;
    const int k = turn * LINES;
    to += k * SIDE;
    if (along + NUMBERS <= (LEFT ? d : h) && across + WIDTH <= (LEFT ? h : d)) {
      const Number *from = V + (LEFT ? (across + k) * d + along
                                    : (along + k % SIDE) * d + across + k / SIDE * SIDE);
      const long beside = LEFT ? SIDE : SIDE * d;
      UNROLL for (int i = 0; i < LINES; i++, from += d, to += SIDE) {
        split<PARTS_OF<Number>>(load(from, first(SIDE)), load(from + beside, first(SIDE)), to);
      }
      return;
    }
    for (int i = k; i < k + LINES; i++, to += SIDE) split_at_the_end(along, across, i, to);
  }
  void ask(long piece, long step, int turn) const {
    const long along = step * NUMBERS, across = piece * WIDTH;
    const int k = turn * LINES;
    const Number *from = V + (LEFT ? (across + k) * d + along : (along + k) * d + across);
    UNROLL for (int i = 0; i < LINES; i++, from += d) {
      prefetch_lines<Cache::SECOND, sizeof(Number) * NUMBERS / 64>((const char *)from);
    }
  }

private:
  // Numbers beyond the ends are zeros; rows are any, since they meet zeros or nobody asks for them.
  void split_at_the_end(long along, long across, int line, int32_t *to) const {
    const auto row = [&](long k) { return V + std::min(k, h - 1) * d; };
    const auto part = [&](long column) { return first(std::max<long>(0, d - column)); };
    if (LEFT) {
      const Number *from = row(across + line) + along;
      split<PARTS_OF<Number>>(load(from, part(along)), load(from + SIDE, part(along + SIDE)), to);
    } else {
      const long column = across + line / SIDE * SIDE, k = along + line % SIDE;
      const Lanes a = load(row(k) + column, part(column));
      split<PARTS_OF<Number>>(a, load(row(k + SIDE) + column, part(column)), to);
    }
  }

  const Number *V;
  const long h, d;
};

} // namespace
