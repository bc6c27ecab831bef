// Pieces of work in shares for blocks or threads: all have as many, to one.

#pragma once

namespace {

// The first of `count` pieces that is in a share.
constexpr long begin_of(long share, long count, long shares) { return share * count / shares; }

} // namespace
