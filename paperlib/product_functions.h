// The functions that `few_rows.py` calls, by the name of a format, from the `project<Format>` and
// `combine<Format>` of a source file, which says what sizes they take.

#pragma once

#define PRODUCTS(name, Format, Projected)                                                          \
  void project_##name(const Format::number *A, const Format::number *V, Projected *out, long m,    \
                      long h, long d, int threads) {                                               \
    project<Format>(A, V, out, m, h, d, threads);                                                  \
  }                                                                                                \
  void combine_##name(const Format::number *W, const Format::number *V, float *out, long m,        \
                      long h, long d, int threads) {                                               \
    combine<Format>(W, V, out, m, h, d, threads);                                                  \
  }
