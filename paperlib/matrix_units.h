// The matrix units of a processor (AMX): their formats, their tiles, and sums of products of tiles.
//
// A unit multiplies a left tile of 16 rows of 64 bytes with a right one, of 16 rows for the columns
// of the left and 16 columns of 32 bits, in which two (bfloat16) or four (8 bits) neighbours of a
// column lie side by side.

#pragma once

#include <cstdint>

#include "lanes.h"

namespace {

constexpr int SIDE = LANES;        // rows of a tile, and numbers of 32 bits in each
constexpr int TILE = SIDE * SIDE;  // of those
constexpr int ROW_BYTES = 4 * SIDE;
constexpr int PANEL = 2 * SIDE;    // rows of V that are multiplied with A at once

constexpr long parts_of(long count, long size) { return (count + size - 1) / size; }
constexpr long rounded_up(long count, long size) { return parts_of(count, size) * size; }

// The compiler does not know what the units read and write in memory.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// The units as these products use them, and as they were before once it ends: the libraries of
// torch have their own way with them.
class Units {
public:
  Units() {
    _tile_storeconfig(before);
    settle();
    alignas(64) uint8_t tiles[64] = {1}; // palette; all eight tiles are full
    for (int k = 0; k < 8; k++) {
      tiles[16 + 2 * k] = ROW_BYTES;
      tiles[48 + k] = SIDE;
    }
    settle();
    _tile_loadconfig(tiles);
  }
  ~Units() { _tile_loadconfig(before); }

private:
  alignas(64) uint8_t before[64];
};

// The sums of LEFT by RIGHT tiles by an intrinsic, which takes the numbers of tiles as they are
// written: 0 to 3 are the sums, 4 and 5 left, 6 and 7 right.
#define MULTIPLY(add_product)                                                                      \
  template <int LEFT, int RIGHT> static void multiply() {                                          \
    add_product(0, 4, 6);                                                                          \
    if constexpr (RIGHT == 2) add_product(1, 4, 7);                                                \
    if constexpr (LEFT == 2) add_product(2, 5, 6);                                                 \
    if constexpr (LEFT == 2 && RIGHT == 2) add_product(3, 5, 7);                                   \
  }

struct Bfloat16 {
  using number = Bfloat16Number;
  using sum = float;
  static constexpr int PER_LANE = 2;

  MULTIPLY(_tile_dpbf16ps)
  // Lanes of two rows, side by side.
  static void order(const Register *x, Register *out) {
    out[0] = _mm512_unpacklo_epi16(x[0], x[1]);
    out[1] = _mm512_unpackhi_epi16(x[0], x[1]);
  }
};

struct Int8 {
  using number = int8_t;
  using sum = int32_t;
  static constexpr int PER_LANE = 4;

  MULTIPLY(_tile_dpbssd)
  // Lanes of four rows, side by side.
  static void order(const Register *x, Register *out) {
    const Register ab = _mm512_unpacklo_epi8(x[0], x[1]), AB = _mm512_unpackhi_epi8(x[0], x[1]);
    const Register cd = _mm512_unpacklo_epi8(x[2], x[3]), CD = _mm512_unpackhi_epi8(x[2], x[3]);
    out[0] = _mm512_unpacklo_epi16(ab, cd);
    out[1] = _mm512_unpackhi_epi16(ab, cd);
    out[2] = _mm512_unpacklo_epi16(AB, CD);
    out[3] = _mm512_unpackhi_epi16(AB, CD);
  }
};

// Numbers in 64 bytes: what of a row goes through the units at once.
template <class F> constexpr int STEP = SIDE * F::PER_LANE;

inline Lanes in_float32(const float *sums) { return _mm512_loadu_ps(sums); }
inline Lanes in_float32(const int32_t *sums) {
  return _mm512_cvtepi32_ps(_mm512_loadu_si512(sums));
}

// Bytes of a row as far as it goes, zeros beyond.
inline Register first_bytes(const void *p, long count) {
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~0ull : (1ull << count) - 1, p);
}

// The sums of LEFT by RIGHT tiles, to which products are added. Left tiles are rows that lie
// `apart` bytes from one another, right ones lie as they are used, a kilobyte each.
template <class F, int LEFT, int RIGHT> struct Sums {
  static void clear() {
    _tile_zero(0);
    if constexpr (RIGHT == 2) _tile_zero(1);
    if constexpr (LEFT == 2) _tile_zero(2);
    if constexpr (LEFT == 2 && RIGHT == 2) _tile_zero(3);
  }
  static void read(const typename F::sum *sums, long below) {
    settle();
    _tile_loadd(0, sums, ROW_BYTES);
    if constexpr (RIGHT == 2) _tile_loadd(1, sums + TILE, ROW_BYTES);
    if constexpr (LEFT == 2) _tile_loadd(2, sums + below, ROW_BYTES);
    if constexpr (LEFT == 2 && RIGHT == 2) _tile_loadd(3, sums + below + TILE, ROW_BYTES);
  }
  static void write(typename F::sum *sums, long below) {
    _tile_stored(0, sums, ROW_BYTES);
    if constexpr (RIGHT == 2) _tile_stored(1, sums + TILE, ROW_BYTES);
    if constexpr (LEFT == 2) _tile_stored(2, sums + below, ROW_BYTES);
    if constexpr (LEFT == 2 && RIGHT == 2) _tile_stored(3, sums + below + TILE, ROW_BYTES);
    settle();
  }
  // `beside(k, i)` is done in every step, when row i of the left tiles has come.
  template <class Beside>
  static void add(const char *left, long apart, const char *right, long next, long advance,
                  long steps, Beside beside) {
    settle();
    for (long k = 0; k < steps; k++, left += ROW_BYTES, right += advance) {
      _tile_loadd(6, right, ROW_BYTES);
      if constexpr (RIGHT == 2) _tile_loadd(7, right + next, ROW_BYTES);
      _tile_loadd(4, left, apart);
      beside(k, 0);
      if constexpr (LEFT == 2) {
        _tile_loadd(5, left + SIDE * apart, apart);
        beside(k, 1);
      }
      F::template multiply<LEFT, RIGHT>();
    }
  }
};

} // namespace
