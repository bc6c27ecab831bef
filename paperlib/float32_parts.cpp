// The products of `few_rows.cpp` in float32, for some dozen rows and more, on matrix units that
// multiply bfloat16. `matrix_units.py` compiles this file and says what it is for.
//
// V is taken piece by piece: 32 of its rows for A V^T, 32 of its columns for W V, and of these as
// many steps along the sums as stay in the first cache in parts. While the last of the few rows are
// multiplied with a piece the next one takes its place, step by step, and the one after that is
// asked for.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)

#include <omp.h>

#include "float32_pieces.h"
#include "shares.h"

namespace {

constexpr long TOTALS_BYTES = 128 << 10; // of pieces that are summed together

// A piece for a run; pieces are taken in groups.
struct Place {
  long group, run, piece;
};

// Multiplies the few rows with this thread's share of the pieces. `finish(piece, totals)` gets the
// sums of each, four tiles for a pair of tiles of the few rows.
template <bool V_LEFT, class Number, class Finish>
void multiply(const FewRows<V_LEFT, PARTS_OF<Number>> &rows, const Pieces<V_LEFT, Number> &V,
              Finish finish) {
  constexpr int COUNT = PARTS_OF<Number>, PAIR = PAIR_OF<COUNT>;
  constexpr int SLOTS = std::size(Slots<COUNT>::SLOT);
  const long me = omp_get_thread_num(), threads = omp_get_num_threads();
  const long begin = begin_of(me, V.count, threads), end = begin_of(me + 1, V.count, threads);
  const long sums = rows.pairs * 4 * TILE; // of a piece
  const long together = std::max<long>(1, TOTALS_BYTES / (sums * sizeof(float)));
  const auto last = [&](Place at) { return std::min(end, at.group + together) - 1; };
  const auto after = [&](Place at) -> Place {
    if (at.piece < last(at)) return {at.group, at.run, at.piece + 1};
    if (at.run < rows.runs - 1) return {at.group, at.run + 1, at.group};
    return {at.group + together, 0, at.group + together};
  };
  const auto steps_of = [&](Place at) { return at.group < end ? rows.steps_of(at.run) : 0; };

  // The steps of a piece in a ring, with room for one of the next.
  constexpr int RING = RUN + 1;
  auto ring = allocate<int32_t>(RING * PAIR);
  const auto in_ring = [&](int start, int k) { return ring.get() + (start + k) % RING * PAIR; };
  auto totals = allocate<float>(together * sums);
  Place now{begin, 0, begin};
  for (int k = 0; k < steps_of(now); k++) {
    for (int turn = 0; turn < TURNS; turn++) V.split_lines(begin, k, turn, in_ring(0, k));
  }
  for (int start = 0; now.group < end;) {
    const Place next = after(now), later = after(next);
    const int steps = steps_of(now), brought = steps_of(next), asked = steps_of(later);
    const int then = (start + RUN) % RING;
    const auto bring = [&](int k, int turn) {
      if (k < brought) V.split_lines(next.piece, next.run * RUN + k, turn, in_ring(then, k));
      if (k < asked) V.ask(later.piece, later.run * RUN + k, turn);
    };
    const auto beside = [&](int k, int slot) {
      const int end = begin_of(slot + 1, TURNS, SLOTS);
      for (int turn = begin_of(slot, TURNS, SLOTS); turn < end; turn++) bring(k, turn);
    };
    const auto idle = [](int, int) {};
    const auto piece = [&](int k) { return in_ring(start, k); };
    float *to = totals.get() + (now.piece - now.group) * sums;
    if (now.run == 0) std::memset(to, 0, sums * sizeof(float));
    for (long pair = 0; pair < rows.pairs; pair++, to += 4 * TILE) {
      const auto few = [&, at = rows.at(now.run, pair)](int k) { return at + k * PAIR; };
      const bool two = rows.two_tiles(pair), end_of_rows = pair == rows.pairs - 1;
      if constexpr (V_LEFT) {
        !end_of_rows ? add_steps<2, 2, COUNT>(piece, few, steps, to, idle)
        : two        ? add_steps<2, 2, COUNT>(piece, few, steps, to, beside)
                     : add_steps<2, 1, COUNT>(piece, few, steps, to, beside);
      } else {
        !end_of_rows ? add_steps<2, 2, COUNT>(few, piece, steps, to, idle)
        : two        ? add_steps<2, 2, COUNT>(few, piece, steps, to, beside)
                     : add_steps<1, 2, COUNT>(few, piece, steps, to, beside);
      }
    }
    for (int k = steps; k < brought; k++) {
      for (int turn = 0; turn < TURNS; turn++) bring(k, turn);
    }
    if (now.run == rows.runs - 1 && now.piece == last(now)) {
      for (long k = now.group; k <= now.piece; k++) finish(k, totals.get() + (k - now.group) * sums);
    }
    now = next, start = then;
  }
}

// The same on all threads, for few rows as they lie.
template <bool V_LEFT, class Number, class Finish>
void multiply(const float *few, const Number *V, long m, long h, long d, int threads,
              Finish finish) {
  FewRows<V_LEFT, PARTS_OF<Number>> rows(m, V_LEFT ? d : h);
  const Pieces<V_LEFT, Number> pieces(V, h, d);
#pragma omp parallel num_threads(threads)
  {
    rows.fill(few);
    Units units;
    multiply(rows, pieces, finish);
  }
}

template <class Number>
void project(const float *A, const Number *V, float *out, long m, long h, long d, int threads) {
  multiply<true>(A, V, m, h, d, threads, [&](long piece, const float *totals) {
    const long begin = piece * WIDTH;
    for (long i = 0; i < m; i += SIDE) {
      const float *tile = totals + i / WIDTH * 4 * TILE + i % WIDTH / SIDE * TILE;
      for (long k = begin; k < std::min(h, begin + WIDTH); k += SIDE, tile += 2 * TILE) {
        put_columns(tile, out + i * h + k, h, m - i, first(h - k));
      }
    }
  });
}

template <class Number>
void combine(const float *W, const Number *V, float *out, long m, long h, long d, int threads) {
  multiply<false>(W, V, m, h, d, threads, [&](long piece, const float *totals) {
    const long begin = piece * WIDTH;
    for (long i = 0; i < m; i++) {
      const float *line = totals + i / WIDTH * 4 * TILE + i % WIDTH / SIDE * 2 * TILE;
      line += i % SIDE * SIDE;
      for (long k = begin; k < std::min(d, begin + WIDTH); k += SIDE, line += TILE) {
        store(out + i * d + k, _mm512_load_ps(line), first(d - k));
      }
    }
  });
}

} // namespace

// Sizes: A (m, d), W (m, h), V (h, d).
extern "C" {
#define PRODUCTS_IN_PARTS(name, Number)                                                            \
  void project_##name(const float *A, const Number *V, float *out, long m, long h, long d,         \
                      int threads) {                                                               \
    project(A, V, out, m, h, d, threads);                                                          \
  }                                                                                                \
  void combine_##name(const float *W, const Number *V, float *out, long m, long h, long d,         \
                      int threads) {                                                               \
    combine(W, V, out, m, h, d, threads);                                                          \
  }
PRODUCTS_IN_PARTS(float32, float)
PRODUCTS_IN_PARTS(float16, Float16Number)
}

#endif
