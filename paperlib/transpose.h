// A tile, turned.

#pragma once

#include <algorithm>

#include "matrix_units.h"

namespace {

// The columns of a tile of sums, in float32.
template <class Sum> void transpose(const Sum *tile, Lanes *out) {
  Lanes a[SIDE], b[SIDE];
  UNROLL for (int k = 0; k < SIDE; k++) a[k] = in_float32(tile + k * SIDE);
  UNROLL for (int k = 0; k < SIDE; k += 2) {
    b[k] = _mm512_unpacklo_ps(a[k], a[k + 1]);
    b[k + 1] = _mm512_unpackhi_ps(a[k], a[k + 1]);
  }
  UNROLL for (int k = 0; k < SIDE; k += 4) {
    a[k] = _mm512_shuffle_ps(b[k], b[k + 2], 0x44);
    a[k + 1] = _mm512_shuffle_ps(b[k], b[k + 2], 0xee);
    a[k + 2] = _mm512_shuffle_ps(b[k + 1], b[k + 3], 0x44);
    a[k + 3] = _mm512_shuffle_ps(b[k + 1], b[k + 3], 0xee);
  }
  UNROLL for (int k = 0; k < 4; k++) {
    const Lanes low = _mm512_shuffle_f32x4(a[k], a[k + 4], 0x88);
    const Lanes high = _mm512_shuffle_f32x4(a[k], a[k + 4], 0xdd);
    const Lanes next_low = _mm512_shuffle_f32x4(a[k + 8], a[k + 12], 0x88);
    const Lanes next_high = _mm512_shuffle_f32x4(a[k + 8], a[k + 12], 0xdd);
    out[k] = _mm512_shuffle_f32x4(low, next_low, 0x88);
    out[k + 4] = _mm512_shuffle_f32x4(high, next_high, 0x88);
    out[k + 8] = _mm512_shuffle_f32x4(low, next_low, 0xdd);
    out[k + 12] = _mm512_shuffle_f32x4(high, next_high, 0xdd);
  }
}

// The same as rows that lie `apart`: as many as there are, at most all of them.
template <class Sum, class Out>
void put_columns(const Sum *tile, Out *out, long apart, long rows, Part part) {
  Lanes columns[SIDE];
  transpose(tile, columns);
  for (long j = 0; j < std::min<long>(rows, SIDE); j++) store(out + j * apart, columns[j], part);
}

// A right tile as a left one, or the other way round.
inline void turn(const int32_t *tile, int32_t *out) {
  Lanes columns[SIDE];
  transpose((const float *)tile, columns);
  UNROLL for (int k = 0; k < SIDE; k++) store(out + k * SIDE, _mm512_castps_si512(columns[k]));
}

} // namespace
