// What will be needed next, asked for line by line beside products, so that it is in a cache by
// then: a processor does not see that far.

#pragma once

#include "lanes.h"

namespace {

enum class Cache { FIRST, SECOND };

// GCC takes calls of a function that does nothing but `_mm_prefetch` for idle, and leaves them out.
template <Cache CACHE> void prefetch(const void *p) {
  if constexpr (CACHE == Cache::FIRST) {
    __asm__ volatile("prefetcht0 (%0)" ::"r"(p));
  } else {
    __asm__ volatile("prefetcht1 (%0)" ::"r"(p));
  }
}

template <Cache CACHE, int LINES> void prefetch_lines(const char *from) {
  UNROLL for (int k = 0; k < LINES; k++) prefetch<CACHE>(from + 64 * k);
}

// A range of memory, of which LINES are asked for at once.
template <Cache CACHE, int LINES> class Ahead {
public:
  Ahead() = default;
  Ahead(const void *from, const void *to) : next((const char *)from), end((const char *)to) {}

  void ask() {
    if (next >= end) return;
    prefetch_lines<CACHE, LINES>(next);
    next += 64 * LINES;
  }

private:
  const char *next = nullptr, *end = nullptr;
};

} // namespace
