// A^T B for tall A and B whose product is symmetric, on matrix units. `symmetric_product.py`
// compiles this file and says what it is for.
//
// Some hundred rows at a time, all columns of B are brought into the order of right tiles, for all
// threads. A thread takes a group of columns of A as left tiles, which its cache holds, and has it
// meet those of B from the diagonal on. The sums lie in the result: of four tiles for 32 by 32
// numbers, block by block of the rows from the diagonal on.

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)

#include <omp.h>

#include <algorithm>
#include <vector>

#include "float32_parts.h"

namespace {

constexpr int GROUP = 8;    // of columns of A, 32 each, ..
constexpr int SEGMENT = 48; // .. that meet so many of B

// Steps of 32 rows at a time: what goes into the cache.
template <class Number> constexpr int STEPS = PARTS_OF<Number> == 1 ? 32 : 16;

// A matrix, zeros beyond its ends.
template <class Number> struct Tall {
  static constexpr int COUNT = PARTS_OF<Number>;
  const Number *V;
  const long h, d;

  // 32 rows of 32 columns as two right tiles, part by part.
  void bring(long row, long column, int32_t *to) const {
    const Part low = first(std::max<long>(0, d - column)),
               high = first(std::max<long>(0, d - column - SIDE));
    UNROLL for (int k = 0; k < SIDE; k++, row++, to += SIDE) {
      const Number *a = V + std::min(row, h - 1) * d + column;
      const Number *b = V + std::min(row + SIDE, h - 1) * d + column;
      const bool there = row < h, too = row + SIDE < h;
      split<COUNT>(load(a, there ? low : 0), load(b, too ? low : 0), to);
      split<COUNT>(load(a + SIDE, there ? high : 0), load(b + SIDE, too ? high : 0), to + TILE);
    }
  }
  // The same as left tiles.
  void bring_turned(long row, long column, int32_t *to) const {
    alignas(64) int32_t lines[PAIR_OF<COUNT>];
    bring(row, column, lines);
    for (int tile = 0; tile < PAIR_OF<COUNT>; tile += TILE) turn(lines + tile, to + tile);
  }
};

// Pairs of columns of A and of B, 32 each.
struct Task {
  long begin, end, first, last;
};

// The tasks on and right of the diagonal, long ones first.
std::vector<Task> tasks_of(long pairs) {
  std::vector<Task> tasks;
  for (long begin = 0; begin < pairs; begin += GROUP) {
    const long end = std::min(pairs, begin + GROUP);
    for (long last = pairs; last > begin; last = std::max(begin, last - SEGMENT)) {
      tasks.push_back({begin, end, std::max(begin, last - SEGMENT), last});
    }
  }
  return tasks;
}

template <class Number>
void add(const Number *A, const Number *B, float *out, long h, long d, int threads) {
  constexpr int COUNT = PARTS_OF<Number>;
  const Tall<Number> left{A, h, d}, right{B, h, d};
  const long pairs = parts_of(d, WIDTH);
  const auto tasks = tasks_of(pairs);
  auto ordered = allocate<int32_t>(pairs * STEPS<Number> * PAIR_OF<COUNT>);
  const auto tiles = [](int32_t *of, long pair, long step) {
    return of + (pair * STEPS<Number> + step) * PAIR_OF<COUNT>;
  };
#pragma omp parallel num_threads(threads)
  {
    Units units;
    auto mine = allocate<int32_t>(GROUP * STEPS<Number> * PAIR_OF<COUNT>);
    auto found = allocate<float>(4 * TILE);
    for (long row = 0; row < h; row += STEPS<Number> * WIDTH) {
      const long steps = std::min<long>(STEPS<Number>, parts_of(h - row, WIDTH));
#pragma omp for schedule(static)
      for (long pair = 0; pair < pairs; pair++) {
        for (long k = 0; k < steps; k++) {
          right.bring(row + k * WIDTH, pair * WIDTH, tiles(ordered.get(), pair, k));
        }
      }
#pragma omp for schedule(dynamic)
      for (size_t t = 0; t < tasks.size(); t++) {
        const Task task = tasks[t];
        for (long pair = task.begin; pair < task.end; pair++) {
          for (long k = 0; k < steps; k++) {
            left.bring_turned(row + k * WIDTH, pair * WIDTH,
                              tiles(mine.get(), pair - task.begin, k));
          }
        }
        for (long with = task.first; with < task.last; with++) {
          for (long pair = task.begin; pair < std::min(task.end, with + 1); pair++) {
            // Blocks of the rows above, less where this one begins.
            const long before = pair * pairs - pair * (pair + 1) / 2;
            float *sums = out + (before + with) * 4 * TILE;
            Sums<Bfloat16, 2, 2>::clear();
            settle();
            for (long k = 0; k < steps; k++) {
              add_step<2, 2, COUNT>(tiles(mine.get(), pair - task.begin, k),
                                    tiles(ordered.get(), with, k), [](int) {});
            }
            Sums<Bfloat16, 2, 2>::write(found.get(), 2 * TILE);
            add_tiles<4>(found.get(), sums);
          }
        }
      }
    }
  }
}

} // namespace

// Sizes: A, B (h, d); out has n (n + 1) / 2 blocks of four tiles, n being d / 32, rounded up.
extern "C" {
void add_bfloat16(const Bfloat16Number *A, const Bfloat16Number *B, float *out, long h, long d,
                  int threads) {
  add(A, B, out, h, d, threads);
}
void add_float32(const float *A, const float *B, float *out, long h, long d, int threads) {
  add(A, B, out, h, d, threads);
}
}

#endif
