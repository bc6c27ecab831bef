// A^T B for tall A and B whose product is symmetric, on matrix units. `symmetric_product.py` compiles
// this file and says what it is for.
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

struct InBfloat16 {
  using number = Bfloat16Number;
  static constexpr int STEPS = 32; // of 32 rows at a time
  static constexpr int PAIR_SIZE = 2 * TILE;

  // 16 columns of two rows, beside one another.
  static void line(const number *a, Part there, const number *b, Part too, int32_t *to) {
    const Register low = _mm512_srli_epi32(_mm512_castps_si512(load(a, there)), 16);
    store(to, _mm512_or_si512(low, _mm512_castps_si512(load(b, too))));
  }
  static void add(const int32_t *left, const int32_t *right) {
    _tile_loadd(4, left, ROW_BYTES);
    _tile_loadd(5, left + TILE, ROW_BYTES);
    _tile_loadd(6, right, ROW_BYTES);
    _tile_loadd(7, right + TILE, ROW_BYTES);
    Bfloat16::multiply<2, 2>();
  }
};

struct InFloat32 {
  using number = float;
  static constexpr int STEPS = 16;
  static constexpr int PAIR_SIZE = PAIR;

  static void line(const number *a, Part there, const number *b, Part too, int32_t *to) {
    split(load(a, there), load(b, too), to);
  }
  static void add(const int32_t *left, const int32_t *right) {
    add_step<2, 2, PARTS, PARTS>(left, right, [](int) {});
  }
};

// A matrix, zeros beyond its ends.
template <class F> struct Tall {
  const typename F::number *V;
  const long h, d;

  // 32 rows of 32 columns as two right tiles, part by part.
  void bring(long row, long column, int32_t *to) const {
    const Part low = first(std::max<long>(0, d - column)),
               high = first(std::max<long>(0, d - column - SIDE));
    UNROLL for (int k = 0; k < SIDE; k++, row++, to += SIDE) {
      const typename F::number *a = V + std::min(row, h - 1) * d + column;
      const typename F::number *b = V + std::min(row + SIDE, h - 1) * d + column;
      const bool there = row < h, too = row + SIDE < h;
      F::line(a, there ? low : 0, b, too ? low : 0, to);
      F::line(a + SIDE, there ? high : 0, b + SIDE, too ? high : 0, to + TILE);
    }
  }
  // The same as left tiles.
  void bring_turned(long row, long column, int32_t *to) const {
    alignas(64) int32_t lines[F::PAIR_SIZE];
    bring(row, column, lines);
    for (int tile = 0; tile < F::PAIR_SIZE; tile += TILE) {
      Lanes columns[SIDE];
      transpose((const float *)lines + tile, columns);
      UNROLL for (int k = 0; k < SIDE; k++) {
        store(to + tile + k * SIDE, _mm512_castps_si512(columns[k]));
      }
    }
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

template <class F>
void add(const typename F::number *A, const typename F::number *B, float *out, long h, long d,
         int threads) {
  const Tall<F> left{A, h, d}, right{B, h, d};
  const long pairs = parts_of(d, WIDTH);
  const auto tasks = tasks_of(pairs);
  auto ordered = allocate<int32_t>(pairs * F::STEPS * F::PAIR_SIZE);
  const auto tiles = [](int32_t *of, long pair, long step) {
    return of + (pair * F::STEPS + step) * F::PAIR_SIZE;
  };
#pragma omp parallel num_threads(threads)
  {
    Units units;
    auto mine = allocate<int32_t>(GROUP * F::STEPS * F::PAIR_SIZE);
    auto found = allocate<float>(4 * TILE);
    for (long row = 0; row < h; row += F::STEPS * WIDTH) {
      const long steps = std::min<long>(F::STEPS, parts_of(h - row, WIDTH));
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
            const long before = pair * pairs - pair * (pair + 1) / 2; // blocks above, less the shift
            float *sums = out + (before + with) * 4 * TILE;
            Sums<Bfloat16, 2, 2>::clear();
            settle();
            for (long k = 0; k < steps; k++) {
              F::add(tiles(mine.get(), pair - task.begin, k), tiles(ordered.get(), with, k));
            }
            Sums<Bfloat16, 2, 2>::write(found.get(), 2 * TILE);
            // Sums of sums lose fewer digits than one long sum.
            for (int k = 0; k < 4 * TILE; k += SIDE) {
              const Lanes more = _mm512_load_ps(found.get() + k);
              _mm512_store_ps(sums + k, _mm512_add_ps(_mm512_load_ps(sums + k), more));
            }
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
  add<InBfloat16>(A, B, out, h, d, threads);
}
void add_float32(const float *A, const float *B, float *out, long h, long d, int threads) {
  add<InFloat32>(A, B, out, h, d, threads);
}
}

#endif
