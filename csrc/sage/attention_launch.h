// From AttentionParams to one instantiation of the attention kernel, for one padded head dim.
#pragma once

#include "attention_kernel.h"
#include "launch.h"

namespace video_attn::sage {

template <class C>
struct AttentionKernel {
  using Params = AttentionParams;
  static constexpr int kThreads = C::kThreads;
  static constexpr int kSharedBytes = C::kSharedBytes;
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr Feature kNeeds = C::kNeeds;

  VIDEO_ATTN_DEVICE static void run(const Params& p) { AttentionBlock<C>(p).run(); }
};

// Whether blocks of so many query tiles see the same keys, and not all of them would be nearly
// empty: then K and V are loaded once for all tiles of a block.
inline bool share_a_list(const AttentionParams& p, int tiles) {
  return p.q_side.length > (tiles - 1) * kTile &&
         (p.lists.counts == nullptr || p.q_side.block_size % (tiles * kTile) == 0);
}

template <QkCode kQk, VCode kV, bool kHalfSums, int kDim>
const char* launch_rows(const AttentionParams& p, void* stream) {
  const int tiles = tiles_in(p.q_side.length);
  if (p.score_shift != nullptr) {  // for 64 rows alone: it takes registers
    using Kernel = AttentionKernel<AttentionConfig<kQk, kV, kHalfSums, kDim, 1, true>>;
    return launch<Kernel>(p, tiles, p.heads, p.batch, stream);
  }
  if (share_a_list(p, 2)) {
    using Kernel = AttentionKernel<AttentionConfig<kQk, kV, kHalfSums, kDim, 2, false>>;
    return launch<Kernel>(p, (tiles + 1) / 2, p.heads, p.batch, stream);
  }
  using Kernel = AttentionKernel<AttentionConfig<kQk, kV, kHalfSums, kDim, 1, false>>;
  return launch<Kernel>(p, tiles, p.heads, p.batch, stream);
}

template <QkCode kQk, VCode kV, int kDim>
const char* launch_sums(const AttentionParams& p, void* stream) {
  return p.half_sums ? launch_rows<kQk, kV, true, kDim>(p, stream)
                     : launch_rows<kQk, kV, false, kDim>(p, stream);
}

template <int kDim>
const char* launch_dim(const AttentionParams& p, void* stream) {
  if (p.qk_code == QkCode::kFp8) {
    return launch_sums<QkCode::kFp8, VCode::kFp8, kDim>(p, stream);
  }
  return p.v_code == VCode::kFp8 ? launch_sums<QkCode::kInt8, VCode::kFp8, kDim>(p, stream)
                                 : launch_sums<QkCode::kInt8, VCode::kFloat16, kDim>(p, stream);
}

// Each in its own source file, so that they compile side by side.
const char* launch_attention_64(const AttentionParams& params, void* stream);
const char* launch_attention_128(const AttentionParams& params, void* stream);
const char* launch_hopper_64(const AttentionParams& params, void* stream);
const char* launch_hopper_128(const AttentionParams& params, void* stream);

}  // namespace video_attn::sage
