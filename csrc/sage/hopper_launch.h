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

  SAGE_DEVICE static void run(const Params& p) { HopperBlock<C>(p).run(); }
};

template <QkCode kQk, VCode kV, int kDim>
const char* launch_consumers(const AttentionParams& p, void* stream) {
  const int tiles = tiles_in(p.q_side.length);
  if (fits_128_rows(p)) {
    using Kernel = HopperKernel<HopperConfig<kQk, kV, kDim, 2>>;
    return launch<Kernel>(p, (tiles + 1) / 2, p.heads, p.batch, stream);
  }
  using Kernel = HopperKernel<HopperConfig<kQk, kV, kDim, 1>>;
  return launch<Kernel>(p, tiles, p.heads, p.batch, stream);
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
