// Component `vsa`: attention over blocks of 64 tokens, on CUDA tensors.
#include "bindings/hopper_device.h"

namespace video_attn::hopper {
namespace {

constexpr Kernel<ForwardParams> kForward{"hopper_fine_forward", fine_forward, kFineBlocks};
constexpr Kernel<BackwardParams> kBackward{"hopper_fine_backward", fine_backward, kFineBlocks};

}  // namespace
}  // namespace video_attn::hopper

STABLE_TORCH_LIBRARY_IMPL(video_attn, CUDA, m) {
  using namespace video_attn::hopper;
  m.impl("hopper_fine_forward", TORCH_BOX((&forward<CudaContext, kForward>)));
  m.impl("hopper_fine_backward", TORCH_BOX((&backward<CudaContext, kBackward>)));
}
