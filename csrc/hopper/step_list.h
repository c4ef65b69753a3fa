// How lists of key blocks become the steps of the forward kernels. Pure arithmetic: the kernels run
// it on the device, tests on a CPU.
//
// Every list is read as halves of 64 keys, whatever its block size: first all full halves in list
// order, then the partial ones. Two halves make a step of 128 keys, so blocks are refined and
// merged by the same rule, and only the last steps of a row need a mask. Empty halves vanish.
#pragma once

#include <cstdint>

#include "device/block_lists.h"

namespace video_attn::hopper {

constexpr int32_t kUnit = 64;  // tokens: rows of a warpgroup; blocks are multiples of it
constexpr int32_t kStepTokens = 2 * kUnit;

// The halves of one row, full ones and all.
struct HalfCounts {
  int32_t full, all;

  VIDEO_ATTN_HOST_DEVICE void add(int32_t valid) {
    full += valid / kUnit;
    all += divide_up(valid, kUnit);
  }
  VIDEO_ATTN_HOST_DEVICE int32_t steps() const { return divide_up(all, 2); }
  // Steps before this one are full: no mask.
  VIDEO_ATTN_HOST_DEVICE int32_t full_steps() const { return full / 2; }
};

// The halves of a row that sees every key of a side without lens.
VIDEO_ATTN_HOST_DEVICE inline HalfCounts dense_halves(int32_t length) {
  return {length / kUnit, divide_up(length, kUnit)};
}

// 64 keys from `token`, of which the first `valid` count.
struct KeyHalf {
  int32_t token, valid;
};

// One entry of a list: a block and its valid tokens.
struct ListEntry {
  int32_t block, valid;
};

// Whether an ascending list of `count` blocks, `stride` apart, holds `block`.
VIDEO_ATTN_HOST_DEVICE inline bool holds_block(const int32_t* indices, int64_t stride,
                                               int32_t count, int32_t block) {
  int32_t first = 0, last = count;  // where it may still be
  while (first < last) {
    const int32_t middle = first + (last - first) / 2;
    const int32_t found = indices[middle * stride];
    if (found == block) return true;
    if (found < block) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return false;
}

// How two rows of a fine tile share loads. Each list is put in a new order: in front, in ascending
// order, the full blocks that both lists hold, so that the first steps of both rows are the same;
// behind, in descending order, what only this row sees, and partial blocks. An entry finds its
// place from the number of entries of either kind before it.
VIDEO_ATTN_HOST_DEVICE inline int32_t paired_place(bool common, int32_t common_before,
                                                   int32_t own_before, int32_t count) {
  return common ? common_before : count - 1 - own_before;
}

// Steps that the rows of a pair share: those made of common blocks alone.
VIDEO_ATTN_HOST_DEVICE inline int32_t shared_steps(int32_t common) { return common / 2; }

// Walks the halves of a row in the order of the steps. `Entries` maps a position in the list to its
// ListEntry; the caller knows from the HalfCounts how many halves there are.
template <class Entries>
class HalfCursor {
 public:
  VIDEO_ATTN_HOST_DEVICE HalfCursor(const Entries& entries, int32_t block_size, HalfCounts counts)
      : entries_(entries), block_size_(block_size), full_left_(counts.full) {}

  VIDEO_ATTN_HOST_DEVICE KeyHalf next() {
    if (full_left_ > 0) return next_full();
    ListEntry entry = entries_(position_++);
    while (entry.valid % kUnit == 0) entry = entries_(position_++);
    const int32_t rest = entry.valid % kUnit;
    return {entry.block * block_size_ + entry.valid - rest, rest};
  }

 private:
  VIDEO_ATTN_HOST_DEVICE KeyHalf next_full() {
    ListEntry entry = entries_(position_);
    while (offset_ + kUnit > entry.valid) {
      entry = entries_(++position_);
      offset_ = 0;
    }
    const KeyHalf half{entry.block * block_size_ + offset_, kUnit};
    offset_ += kUnit;
    if (--full_left_ == 0) position_ = 0;  // the partial ones are a second walk
    return half;
  }

  Entries entries_;
  int32_t block_size_;
  int32_t full_left_;
  int32_t position_ = 0;  // in the list
  int32_t offset_ = 0;    // of the next half in its block
};

}  // namespace video_attn::hopper
