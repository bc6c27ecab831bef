// W V on the matrix units, chunk by chunk of the rows of V, a thread having sums of its own.
//
// Rows of W are the left tiles. Chunks of some hundred rows of V are brought into order, strip by
// strip of their columns, and used for all rows of W.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "panels.h"
#include "shares.h"

namespace {

constexpr int MOST_CHUNK = 512; // rows of V

// The sums of W V of one thread. `Total` is float32, or of the whole numbers that the units give.
template <class F, class Total> class Combination {
  using number = typename F::number;
  static constexpr int REGISTERS = F::PER_LANE;

public:
  const long m, d, blocks;
  Chunk<F> V;

  // For chunks of so many rows of V, a multiple of STEP.
  Combination(long m, long d, long chunk)
      : m(m), d(d), blocks(parts_of(m, SIDE)), V(chunk, d),
        found(allocate<typename F::sum>(4 * TILE)),
        totals(allocate<Total>(V.strips * blocks * REGISTERS * TILE)) {}

  // Adds the products with the first `rows` rows of the chunk, scales[i] times those of row i of W.
  // The rows of W, of which there are whole tiles, lie a chunk apart.
  void add(const number *W, const float *scales, long rows) {
    const long steps = parts_of(rows, STEP<F>), groups = parts_of(blocks, 2) * REGISTERS / 2;
    for (long s = 0; s < V.strips; s++) {
      const int32_t *next = V.at(s + 1, 0, 0);
      // Each product asks for its share of the next strip.
      long group = 0;
      const auto share = [&](long k) { return next + k * steps / groups * REGISTERS * TILE; };
      for (long b = 0; b < blocks; b += 2) {
        for (int q = 0; q < REGISTERS; q += 2, group++) {
          const Next strip(share(group), share(group + 1));
          b + 1 < blocks ? multiply<2>(W, scales, s, b, q, steps, strip)
                         : multiply<1>(W, scales, s, b, q, steps, strip);
        }
      }
    }
    empty = false;
  }

  // Adds the totals of row i to out.
  void add_to(float *out, long i) const {
    if (empty) return;
    constexpr int GROUP = 4; // columns that lie side by side
    alignas(64) float strip[STEP<F>], found[SIDE];
    for (long s = 0; s < V.strips; s++) {
      for (int q = 0; q < REGISTERS; q++) {
        _mm512_store_ps(found, in_float32(at(s, i / SIDE, q) + i % SIDE * SIDE));
        UNROLL for (int k = 0; k < SIDE; k += GROUP) {
          std::memcpy(strip + V.column(q, k), found + k, GROUP * sizeof(float));
        }
      }
      float *to = out + s * STEP<F>;
      for (int k = 0; k < STEP<F>; k += SIDE) {
        const Part part = first(std::max<long>(0, d - s * STEP<F> - k));
        store(to + k, _mm512_add_ps(load(to + k, part), _mm512_load_ps(strip + k)), part);
      }
    }
  }

private:
  using Next = Ahead<Cache::FIRST, 8>;

  template <int LEFT>
  void multiply(const number *W, const float *scales, long s, long b, int q, long steps,
                Next strip) {
    using Here = Sums<F, LEFT, 2>;
    constexpr bool same = std::is_same_v<Total, typename F::sum>;
    const long below = REGISTERS * TILE, chunk = V.steps * STEP<F>;
    Total *to = at(s, b, q);
    // Sums lie in the order of the products, but for those of two blocks, which are mixed.
    const Total *after = at(s, b, 0) + (LEFT * REGISTERS + LEFT * q) * TILE;
    Next sums(after, after + 2 * LEFT * TILE);
    const auto ask = [&](long, int) {
      // Where vector instructions add to the sums, nothing is gained.
      if constexpr (same) sums.ask(), strip.ask();
    };
    if constexpr (same) {
      empty ? Here::clear() : Here::read(to, below);
    } else {
      Here::clear();
    }
    Here::add((const char *)(W + b * SIDE * chunk), chunk * sizeof(number),
              (const char *)V.at(s, 0, q), 4 * TILE, REGISTERS * 4 * TILE, steps, ask);
    if constexpr (same) {
      Here::write(to, below);
    } else {
      Here::write(found.get(), 2 * TILE);
      for (int left = 0; left < LEFT; left++) {
        for (int k = 0; k < 2 * SIDE; k++) {
          const long row = (b + left) * SIDE + k % SIDE;
          const Lanes more = in_float32(found.get() + left * 2 * TILE + k * SIDE);
          float *line = to + left * below + k * SIDE;
          const Lanes total = empty ? all(0) : _mm512_load_ps(line);
          _mm512_store_ps(line, multiply_add(all(scales[row]), more, total));
        }
      }
    }
  }

  Total *at(long s, long b, int q) const {
    return totals.get() + ((s * blocks + b) * REGISTERS + q) * TILE;
  }

  Memory<typename F::sum> found;
  Memory<Total> totals;
  bool empty = true; // the totals, which are not zeros from the start
};

// How many rows of V a thread takes at once, of its share of them. With few rows on the left all
// that it works on stays in its cache; with many, reading and writing the sums for every chunk
// takes longer than what comes from beyond the cache. In 8 bits fewer are many: vector instructions
// add what the tiles give.
template <class F> long chunk_rows(long m, long h, long d, int threads) {
  constexpr int MANY = std::is_same_v<typename F::sum, float> ? 7 * SIDE : 3 * SIDE;
  const long bytes = m > MANY ? 1536 << 10 : 576 << 10;
  const long rows = bytes / (d * (long)sizeof(typename F::number)) / STEP<F> * STEP<F>;
  const long most = std::clamp<long>(rows, STEP<F>, MOST_CHUNK);
  const long share = rounded_up(parts_of(h, threads), STEP<F>);
  return rounded_up(parts_of(share, parts_of(share, most)), STEP<F>);
}

// Adds the sums of all threads to out, (height, d): row i to its row i % height.
template <class Sums> void add_up(const Sums *const *sums, int threads, float *out, long height) {
#pragma omp for schedule(static)
  for (long row = 0; row < height; row++) {
    for (int t = 0; t < threads; t++) {
      for (long i = row; i < sums[t]->m; i += height) sums[t]->add_to(out + row * sums[t]->d, i);
    }
  }
}

// Features `begin`, .., of which there are `count`. W, as it goes back through V, has rows `apart`
// from one another; in 8 bits they may have scales.
template <class Number> struct Range {
  const long begin, count, apart;
  Number *W;
  float *scales;

  Number *w(long i) const { return W + i * apart; }
};
// What is done with a chunk of V: it goes into the order of right tiles.
template <class F> struct Work : Range<typename F::number> {
  Chunk<F> &V;
};

// Adds W V to out, m rows to its (height, d), chunk by chunk of the h rows of V. Every thread calls
// `begin(chunk)`, for chunks of so many rows, and what that returns with each `Work`.
template <class F, class Total, class Begin>
void add_chunks(long m, float *out, long height, long h, long d, int threads, const Begin &begin) {
  using Mine = Combination<F, Total>;
  const long chunk = chunk_rows<F>(m, h, d, threads);
  std::vector<Mine *> all_sums(threads);
#pragma omp parallel num_threads(threads)
  {
    auto work = begin(chunk);
    Units units;
    Mine mine(m, d, chunk);
    const int me = omp_get_thread_num(), team = omp_get_num_threads();
    all_sums[me] = &mine;
    auto W = zeros<typename F::number>(mine.blocks * SIDE * chunk);
    auto scales = zeros<float>(mine.blocks * SIDE);
    const long steps = parts_of(h, STEP<F>);
    const long end = std::min(h, begin_of(me + 1, steps, team) * STEP<F>);
    for (long first = begin_of(me, steps, team) * STEP<F>; first < end; first += chunk) {
      const long count = std::min(chunk, end - first);
      work(Work<F>{{first, count, chunk, W.get(), scales.get()}, mine.V});
      mine.add(W.get(), scales.get(), count);
    }
#pragma omp barrier
    add_up(all_sums.data(), team, out, height);
  }
}

} // namespace
