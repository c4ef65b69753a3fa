#pragma once

#include "hopper/primitives.h"
#include "hopper/step_list.h"

namespace video_attn::hopper {

// The entries of one row, read by a warp 32 at a time: a lane holds one, and the indices of the
// next 32 are already on their way.
class WarpEntries {
 public:
  __device__ WarpEntries(const RowList& list, const Side& side, const int32_t* lens)
      : list_(list), side_(side), lens_(lens) {
    following_ = index_at(threadIdx.x % 32);
  }

  // By a whole warp.
  __device__ ListEntry operator()(int32_t position) {
    if (position / 32 != chunk_) load(position / 32);
    return {__shfl_sync(~0u, block_, position % 32), __shfl_sync(~0u, valid_, position % 32)};
  }

 private:
  __device__ int32_t index_at(int32_t entry) const {
    return entry < list_.count ? list_.block(entry) : 0;
  }

  __device__ void load(int32_t chunk) {
    const int32_t lane = threadIdx.x % 32;
    block_ = chunk == chunk_ + 1 ? following_ : index_at(chunk * 32 + lane);
    valid_ = valid_tokens(block_, side_.block_size, side_.length, lens_);
    following_ = index_at((chunk + 1) * 32 + lane);
    chunk_ = chunk;
  }

  RowList list_;
  const Side& side_;
  const int32_t* lens_;
  int32_t chunk_ = -1;
  int32_t block_ = 0, valid_ = 0, following_ = 0;
};

}  // namespace video_attn::hopper
