// A V^T and W V for a V of many rows and an A (m, d) or W (m, h) of few, all of them row by row in
// memory. `few_rows.py` compiles this file and says what it is for.
//
// A V^T is made of dot products along d: registers hold the sums of a few rows of A with a few of
// V, and V is read as it lies. W V is made of strips of 32 columns: a strip of some hundred rows of
// V is brought into the order of its products, in the cache, and used for all rows of W.
// Both ask for what they will need next while they multiply (`_mm_prefetch`).
//
// A 32-bit lane multiplies one float32, two bfloat16 or four whole numbers of 8 bits at once. The
// sums of a row do not depend on how many other rows, or threads, there are.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int LANES = 16;          // of a register
constexpr int STRIP = 2 * LANES;   // columns of W V that are summed at once
constexpr int PROJECT_ROWS = 6;    // of A ..
constexpr int PROJECT_COLUMNS = 4; // .. with so many of V
constexpr int COMBINE_ROWS = 14;   // of W
constexpr int CHUNK_STEPS = 128;   // of the strip in the cache; a step is one product a lane
constexpr int NEIGHBOURS = 4;      // strips whose next rows are asked for together

// Memory that starts where a cache line does.
template <class T> struct Free {
  void operator()(T *memory) const { std::free(memory); }
};
template <class T> std::unique_ptr<T[], Free<T>> allocate(long count) {
  const long bytes = (count * sizeof(T) + 63) / 64 * 64;
  return std::unique_ptr<T[], Free<T>>(static_cast<T *>(std::aligned_alloc(64, bytes)));
}

// What is common to the formats whose sums are in float32.
struct FloatingSums {
  using sums = __m512;
  static sums zero() { return _mm512_setzero_ps(); }
  static sums add(sums a, sums b) { return _mm512_add_ps(a, b); }
  static __m512i of_v(__m512i v) { return v; }
  static int32_t offset(const void *, long) { return 0; }
  static __m512 as_float(sums c, int32_t) { return c; }
};

struct Float32 : FloatingSums {
  using number = float;
  static constexpr int PER_LANE = 1;
  // Sums of 4 neighbouring columns, in the order in which they lie in two registers.
  static constexpr int ORDER[8] = {0, 4, 8, 12, 16, 20, 24, 28};

  static __m512i first(const number *p, int count) {
    return _mm512_castps_si512(_mm512_maskz_loadu_ps((1u << count) - 1, p));
  }
  static sums add_product(sums c, __m512i v, __m512i a) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(v), _mm512_castsi512_ps(a), c);
  }

  // 32 columns of a row.
  static void order(const number *V, long d, __m512i &v, __m512i &u) {
    v = _mm512_loadu_si512(V);
    u = _mm512_loadu_si512(V + LANES);
  }
};

#ifdef __AVX512BF16__
struct Bfloat16 : FloatingSums {
  using number = uint16_t;
  static constexpr int PER_LANE = 2;
  static constexpr int ORDER[8] = {0, 8, 16, 24, 4, 12, 20, 28};

  static __m512i first(const number *p, int count) {
    return _mm512_maskz_loadu_epi16((1ull << count) - 1, p);
  }
  static sums add_product(sums c, __m512i v, __m512i a) {
    return _mm512_dpbf16_ps(c, (__m512bh)v, (__m512bh)a);
  }

  // 32 columns of a pair of rows, pair by pair.
  static void order(const number *V, long d, __m512i &v, __m512i &u) {
    const __m512i one = _mm512_loadu_si512(V), other = _mm512_loadu_si512(V + d);
    v = _mm512_unpacklo_epi16(one, other);
    u = _mm512_unpackhi_epi16(one, other);
  }
};
#endif

#ifdef __AVX512VNNI__
// The instruction multiplies numbers without a sign with numbers with one: 128 is added to those of
// V, and 128 times the sum of the others is taken off in the end.
struct Int8 {
  using number = int8_t;
  using sums = __m512i;
  static constexpr int PER_LANE = 4;
  static constexpr int ORDER[8] = {0, 16, 4, 20, 8, 24, 12, 28};

  static sums zero() { return _mm512_setzero_si512(); }
  static sums add(sums a, sums b) { return _mm512_add_epi32(a, b); }
  static __m512i first(const number *p, int count) {
    return _mm512_maskz_loadu_epi8(count == 64 ? ~0ull : (1ull << count) - 1, p);
  }
  static sums add_product(sums c, __m512i v, __m512i a) {
    // For the intrinsic, GCC 12 stores the sums after every product.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(v), "v"(a));
    return c;
  }
  static __m512i of_v(__m512i v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
  static int32_t offset(const number *a, long count) {
    int32_t sum = 0;
    for (long k = 0; k < count; k++) sum += a[k];
    return 128 * sum;
  }
  static __m512 as_float(sums c, int32_t offset) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(c, _mm512_set1_epi32(offset)));
  }

  // 32 columns of four rows, four by four.
  static void order(const number *V, long d, __m512i &v, __m512i &u) {
    const __m256i flip = _mm256_set1_epi8(-128);
    __m256i x[4];
    UNROLL for (int k = 0; k < 4; k++) {
      x[k] = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(V + k * d)), flip);
    }
    const __m256i ab = _mm256_unpacklo_epi8(x[0], x[1]), AB = _mm256_unpackhi_epi8(x[0], x[1]);
    const __m256i cd = _mm256_unpacklo_epi8(x[2], x[3]), CD = _mm256_unpackhi_epi8(x[2], x[3]);
    v = both(_mm256_unpacklo_epi16(ab, cd), _mm256_unpackhi_epi16(ab, cd));
    u = both(_mm256_unpacklo_epi16(AB, CD), _mm256_unpackhi_epi16(AB, CD));
  }
  static __m512i both(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
};
#endif

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }

// A load that is not made again for every product, as GCC makes it for float32.
inline __m512i load_once(const void *p) {
  __m512i loaded = load(p);
  __asm__("" : "+v"(loaded));
  return loaded;
}

// Where a block of rows begins: all have the same height, to one.
inline long begin_of(long block, long m, long blocks) { return block * m / blocks; }

// The totals of four registers, less an offset.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d, int32_t) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 all = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline __m128 totals(__m512i a, __m512i b, __m512i c, __m512i d, int32_t offset) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i low = _mm512_unpacklo_epi64(ab, cd), high = _mm512_unpackhi_epi64(ab, cd);
  const __m512i all = _mm512_add_epi32(low, high);
  const __m256i left = _mm512_castsi512_si256(all), right = _mm512_extracti32x8_epi32(all, 1);
  const __m256i half = _mm256_add_epi32(left, right);
  const __m128i first = _mm256_castsi256_si128(half), second = _mm256_extracti128_si256(half, 1);
  const __m128i sum = _mm_add_epi32(first, second);
  return _mm_cvtepi32_ps(_mm_sub_epi32(sum, _mm_set1_epi32(offset)));
}

inline void put(float *out, __m128 values, int count) {
  _mm_mask_storeu_ps(out, (1 << count) - 1, values);
}
#ifdef __AVX512BF16__
inline void put(uint16_t *out, __m128 values, int count) {
  _mm_mask_storeu_epi16(out, (1 << count) - 1, (__m128i)_mm_cvtneps_pbh(values));
}
#endif

// ---- A V^T

// (ROWS, COLUMNS) of the products; A and V begin at the first of them. Of the rows of V that come
// next, it asks for AHEAD from `next` on.
template <class F, class Out, int ROWS, int COLUMNS, int AHEAD>
void project_block(const typename F::number *A, const typename F::number *V, long d, Out *out,
                   long h, const int32_t *offsets, const typename F::number *next) {
  typename F::sums c[ROWS][PROJECT_COLUMNS];
  UNROLL for (int i = 0; i < ROWS; i++) {
    UNROLL for (int j = 0; j < PROJECT_COLUMNS; j++) c[i][j] = F::zero();
  }
  constexpr int WIDTH = LANES * F::PER_LANE;
  long k = 0;
  for (; k + WIDTH <= d; k += WIDTH) {
    __m512i v[COLUMNS];
    UNROLL for (int j = 0; j < COLUMNS; j++) v[j] = F::of_v(load(V + j * d + k));
    UNROLL for (int j = 0; j < AHEAD; j++) {
      _mm_prefetch((const char *)(next + j * d + k), _MM_HINT_T1);
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
      const __m512i a = load_once(A + i * d + k);
      UNROLL for (int j = 0; j < COLUMNS; j++) c[i][j] = F::add_product(c[i][j], v[j], a);
    }
  }
  if (k < d) {
    __m512i v[COLUMNS];
    UNROLL for (int j = 0; j < COLUMNS; j++) v[j] = F::of_v(F::first(V + j * d + k, d - k));
    UNROLL for (int i = 0; i < ROWS; i++) {
      const __m512i a = F::first(A + i * d + k, d - k);
      UNROLL for (int j = 0; j < COLUMNS; j++) c[i][j] = F::add_product(c[i][j], v[j], a);
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) {
    put(out + i * h, totals(c[i][0], c[i][1], c[i][2], c[i][3], offsets[i]), COLUMNS);
  }
}

template <class F, class Out> using ProjectBlock = decltype(&project_block<F, Out, 1, 1, 0>);

template <class F, class Out, int ROWS>
ProjectBlock<F, Out> project_block_of(int columns, int ahead) {
  if (columns == 1) return project_block<F, Out, ROWS, 1, 0>;
  if (columns == 2) return project_block<F, Out, ROWS, 2, 0>;
  if (columns == 3) return project_block<F, Out, ROWS, 3, 0>;
  if (ahead == 1) return project_block<F, Out, ROWS, 4, 1>;
  if (ahead == 2) return project_block<F, Out, ROWS, 4, 2>;
  return ahead ? project_block<F, Out, ROWS, 4, 4> : project_block<F, Out, ROWS, 4, 0>;
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
  const int share = blocks >= 4 ? 1 : blocks >= 2 ? 2 : 4;
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
    __m512i v, u;
    if (FIRST) {
      F::order(V, d, v, u);
      _mm512_store_si512(strip, v);
      _mm512_store_si512(strip + F::PER_LANE * LANES, u);
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
      const __m512i w = _mm512_set1_epi32(W[i]);
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

// The 32 sums of a row for a strip, as they lie in two registers, into the columns that there are.
template <class F>
void put_strip(const typename F::sums *sums, int32_t offset, float *out, int columns) {
  alignas(64) float found[STRIP], line[STRIP];
  _mm512_store_ps(found, F::as_float(sums[0], offset));
  _mm512_store_ps(found + LANES, F::as_float(sums[1], offset));
  for (int k = 0; k < 8; k++) std::memcpy(line + F::ORDER[k], found + 4 * k, 16);
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
      const long first = part * strips / parts, count = (part + 1) * strips / parts - first;
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
#define PRODUCTS(name, Format, Projected)                                                          \
  void project_##name(const Format::number *A, const Format::number *V, Projected *out, long m,    \
                      long h, long d, int threads) {                                               \
    project<Format>(A, V, out, m, h, d, threads);                                                  \
  }                                                                                                \
  void combine_##name(const Format::number *W, const Format::number *V, float *out, long m,        \
                      long h, long d, int threads) {                                               \
    combine<Format>(W, V, out, m, h, d, threads);                                                  \
  }
PRODUCTS(float32, Float32, float)
#ifdef __AVX512BF16__
PRODUCTS(bfloat16, Bfloat16, uint16_t)
#endif
#ifdef __AVX512VNNI__
PRODUCTS(int8, Int8, float)
#endif
}
