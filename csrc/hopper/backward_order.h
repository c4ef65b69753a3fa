// The order in which the blocks of threads of a walk run: the longest lists of a head first, so
// that no long one is left for the end, and neighbours in length side by side in a block of
// threads. The results do not depend on it.
#pragma once

#include "hopper/backward_config.h"
#include "hopper/primitives.h"

namespace video_attn::hopper {

constexpr int kOrderThreads = 256;

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

// One thread per item: its rank is the number of items that come before it.
__device__ inline void run_order(const OrderGlobals& globals, int32_t* lengths) {
  const int32_t chunks = (globals.items + kOrderThreads - 1) / kOrderThreads;
  const int32_t row = blockIdx.x / chunks;
  const int32_t head = row % globals.heads, batch = row / globals.heads;
  const int32_t item = blockIdx.x % chunks * kOrderThreads + threadIdx.x;
  const int32_t mine = item < globals.items ? list_length(globals, item, head, batch) : 0;
  int32_t rank = 0;
  for (int32_t base = 0; base < globals.items; base += kOrderThreads) {
    const int32_t other = base + threadIdx.x;
    __syncthreads();
    lengths[threadIdx.x] = other < globals.items ? list_length(globals, other, head, batch) : -1;
    __syncthreads();
    for (int32_t i = 0; i < kOrderThreads; ++i) {
      rank += lengths[i] > mine || (lengths[i] == mine && base + i < item);
    }
  }
  if (item < globals.items) {
    globals.order[static_cast<int64_t>(row) * globals.items + rank] = item;
  }
}

static __global__ void __launch_bounds__(kOrderThreads)
    order_lists(const __grid_constant__ OrderGlobals globals) {
  run_order(globals, reinterpret_cast<int32_t*>(shared_memory()));
}

}  // namespace video_attn::hopper
