// Registers of `few_rows.cpp`, and the format that all processors have.

#pragma once

#include "lanes.h"

namespace {

// A load that is not made again for every product, as GCC makes it for float32.
inline Register load_once(const void *p) {
  Register loaded = load(p);
  __asm__("" : "+v"(loaded));
  return loaded;
}

// What is common to the formats whose sums are in float32.
struct FloatingSums {
  using sums = Lanes;
  static sums zero() { return all(0); }
  static sums add(sums a, sums b) { return a + b; }
  static Register of_v(Register v) { return v; }
  static int32_t offset(const void *, long) { return 0; }
  static void write(float *to, sums c, int32_t) { store(to, c, ::first(LANES)); }
};

struct Float32 : FloatingSums {
  using number = float;
  static constexpr int PER_LANE = 1;
  // Sums of 4 neighbouring columns, in the order in which they lie in two registers.
  static constexpr int ORDER[8] = {0, 4, 8, 12, 16, 20, 24, 28};

  static Register first(const number *p, int count) { return (Register)load(p, ::first(count)); }
  static sums add_product(sums c, Register v, Register a) {
    return multiply_add((Lanes)v, (Lanes)a, c);
  }

  // Two registers of columns of a row.
  static void order(const number *V, long, Register &v, Register &u) {
    v = load(V);
    u = load(V + LANES);
  }
};

} // namespace
