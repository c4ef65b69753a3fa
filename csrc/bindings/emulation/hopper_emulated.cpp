// The operators on CPU tensors, by the host emulation of the Hopper kernels: for tests, not
// shipped.
#include "bindings/hopper_operators.h"
#include "emulation/block.h"

namespace video_attn::hopper {
namespace {

struct EmulatedContext {
  EmulatedContext(const char*, const Tensor&) {}
  static const char* describe(cudaError_t error) { return cudaGetErrorString(error); }

  cudaStream_t stream = nullptr;
};

constexpr Kernel<ForwardParams> kCoarseForward{"hopper_coarse_forward", coarse_forward,
                                               kCoarseBlocks};
constexpr Kernel<BackwardParams> kCoarseBackward{"hopper_coarse_backward", coarse_backward,
                                                 kCoarseBlocks};
constexpr Kernel<ForwardParams> kFineForward{"hopper_fine_forward", fine_forward, kFineBlocks};
constexpr Kernel<BackwardParams> kFineBackward{"hopper_fine_backward", fine_backward, kFineBlocks};

}  // namespace
}  // namespace video_attn::hopper

STABLE_TORCH_LIBRARY_IMPL(video_attn, CPU, m) {
  using namespace video_attn::hopper;
  m.impl("hopper_coarse_forward", TORCH_BOX((&forward<EmulatedContext, kCoarseForward>)));
  m.impl("hopper_coarse_backward", TORCH_BOX((&backward<EmulatedContext, kCoarseBackward>)));
  m.impl("hopper_fine_forward", TORCH_BOX((&forward<EmulatedContext, kFineForward>)));
  m.impl("hopper_fine_backward", TORCH_BOX((&backward<EmulatedContext, kFineBackward>)));
}

// See emulation::Options.
extern "C" __attribute__((visibility("default"))) void hopper_emulation_options(bool late_copies,
                                                                                bool late_products,
                                                                                bool last_first) {
  video_attn::emulation::options = {90, late_copies, late_products, last_first};
}
