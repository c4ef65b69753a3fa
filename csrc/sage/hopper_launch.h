// From AttentionParams to one instantiation of the warpgroup kernel, for one padded head dim.
#pragma once

#include "attention_launch.h"
#include "hopper_kernel.h"

namespace video_attn::sage {

template <class C>
struct HopperKernel {
  using Params = AttentionParams;
  static constexpr int kThreads = C::kThreads;
  static constexpr int kBlocksPerProcessor = C::kBlocksPerProcessor;
  static constexpr int kSharedBytes = sizeof(HopperShared<C>);
  static constexpr Feature kNeeds = Feature::kWarpgroups;

  VIDEO_ATTN_DEVICE static void run(const Params& p) { HopperBlock<C>(p).run(); }
};

template <QkCode kQk, VCode kV, int kDim, int kConsumers, bool kShifted = false>
const char* launch_config(const AttentionParams& p, void* stream) {
  using Kernel = HopperKernel<HopperConfig<kQk, kV, kDim, kConsumers, kShifted>>;
  const int tiles = tiles_in(p.q_side.length);
  return launch<Kernel>(p, (tiles + kConsumers - 1) / kConsumers, p.heads, p.batch, stream);
}

template <QkCode kQk, VCode kV, int kDim>
const char* launch_consumers(const AttentionParams& p, void* stream) {
  if (p.score_shift != nullptr) return launch_config<kQk, kV, kDim, 1, true>(p, stream);
  // Products with FP8 values are short and their sums take registers: two consumers are faster.
  if constexpr (kV == VCode::kFloat16) {
    if (share_a_list(p, 3)) return launch_config<kQk, kV, kDim, 3>(p, stream);
  }
  if (share_a_list(p, 2)) return launch_config<kQk, kV, kDim, 2>(p, stream);
  return launch_config<kQk, kV, kDim, 1>(p, stream);
}

template <int kDim>
const char* launch_hopper(const AttentionParams& p, void* stream) {
  if (p.qk_code == QkCode::kFp8) {
    return launch_consumers<QkCode::kFp8, VCode::kFp8, kDim>(p, stream);
  }
  return p.v_code == VCode::kFp8
             ? launch_consumers<QkCode::kInt8, VCode::kFp8, kDim>(p, stream)
             : launch_consumers<QkCode::kInt8, VCode::kFloat16, kDim>(p, stream);
}

}  // namespace video_attn::sage
