// Memory that starts where a cache line does.
//
// What a thread gives back it keeps for the next call: from the system, a few megabytes come page
// by page and take as long as a product with a block of V does.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace {

class Kept {
public:
  void *take(long bytes) {
    for (auto block = blocks.begin(); block != blocks.end(); ++block) {
      if (block->first != bytes) continue;
      void *memory = block->second;
      blocks.erase(block);
      total -= bytes;
      return memory;
    }
    void *memory = std::aligned_alloc(64, bytes);
    if (!memory && bytes) {
      // An exception cannot leave the threads of OpenMP, nor reach Python.
      std::fprintf(stderr, "paperlib: no memory for %ld bytes in a kernel\n", bytes);
      std::abort();
    }
    return memory;
  }
  void give(long bytes, void *memory) {
    blocks.emplace_back(bytes, memory);
    total += bytes;
    while (total > MOST_BYTES || blocks.size() > MOST_BLOCKS) {
      total -= blocks.front().first;
      std::free(blocks.front().second);
      blocks.erase(blocks.begin());
    }
  }
  ~Kept() {
    for (auto &block : blocks) std::free(block.second);
  }

private:
  static constexpr long MOST_BYTES = 32 << 20;
  static constexpr size_t MOST_BLOCKS = 32;
  long total = 0;
  std::vector<std::pair<long, void *>> blocks;
};

inline Kept &kept() {
  thread_local Kept mine;
  return mine;
}

template <class T> struct Free {
  long bytes = 0;
  void operator()(T *memory) const { kept().give(bytes, memory); }
};
template <class T> using Memory = std::unique_ptr<T[], Free<T>>;

// As it comes, ..
template <class T> Memory<T> allocate(long count) {
  const long bytes = (count * sizeof(T) + 63) / 64 * 64;
  return Memory<T>(static_cast<T *>(kept().take(bytes)), Free<T>{bytes});
}
// .. or of zeros.
template <class T> Memory<T> zeros(long count) {
  auto memory = allocate<T>(count);
  std::memset((void *)memory.get(), 0, count * sizeof(T));
  return memory;
}

} // namespace
