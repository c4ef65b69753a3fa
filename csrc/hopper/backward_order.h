// The order in which the blocks of threads of a walk run: the longest lists of a head first, and
// neighbours in length side by side in a block of threads. The results do not depend on it.
#pragma once

#include "hopper/backward_config.h"
#include "hopper/heaviest_first.h"

namespace video_attn::hopper {

struct OrderGlobals {
  BlockLists lists;        // of the kept side
  int32_t* order;          // [batches, heads, items]: items by falling length
  int32_t items;           // of 64 or 128 kept tokens, with one list each
  int32_t block_items;     // in a block
  int32_t list_heads;      // lists that an item walks, one after another
  int32_t batches, heads;  // 1 where the lists are the same for all
};

__device__ inline int32_t list_length(const OrderGlobals& globals, int32_t item, int32_t head,
                                      int32_t batch) {
  const BlockLists& lists = globals.lists;
  int32_t length = 0;
  for (int32_t member = 0; member < globals.list_heads; ++member) {
    length += lists.counts[batch * lists.counts_batch_stride +
                           (head * globals.list_heads + member) * lists.counts_head_stride +
                           item / globals.block_items * lists.counts_row_stride];
  }
  return length;
}

// One block of threads for all items of a head.
static __global__ void __launch_bounds__(kSortThreads)
    order_lists(const __grid_constant__ OrderGlobals globals) {
  const int32_t head = blockIdx.x % globals.heads, batch = blockIdx.x / globals.heads;
  heaviest_first(*reinterpret_cast<SortMemory*>(shared_memory()), globals.items,
                 globals.order + static_cast<int64_t>(blockIdx.x) * globals.items,
                 [&](int32_t item) { return list_length(globals, item, head, batch); });
}

}  // namespace video_attn::hopper
