// Component `sta`: attention over blocks of at least 128 tokens, and dense, on CUDA tensors.
#include "bindings/hopper_device.h"

namespace video_attn::hopper {
namespace {

constexpr Kernel<ForwardParams> kForward{"hopper_coarse_forward", coarse_forward, kCoarseBlocks};
constexpr Kernel<BackwardParams> kBackward{"hopper_coarse_backward", coarse_backward,
                                           kCoarseBlocks};

}  // namespace
}  // namespace video_attn::hopper

STABLE_TORCH_LIBRARY_IMPL(video_attn, CUDA, m) {
  using namespace video_attn::hopper;
  m.impl("hopper_coarse_forward", TORCH_BOX((&forward<CudaContext, kForward>)));
  m.impl("hopper_coarse_backward", TORCH_BOX((&backward<CudaContext, kBackward>)));
}
