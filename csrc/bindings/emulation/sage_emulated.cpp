// The operators on CPU tensors, by the host emulation of the kernels: for tests, not shipped.
#include "bindings/sage_operators.h"
#include "emulation/block.h"

namespace video_attn::sage {
namespace {

struct EmulatedContext {
  explicit EmulatedContext(const Tensor&) {}

  void* stream = nullptr;
  int capability = emulation::options.capability;
};

}  // namespace
}  // namespace video_attn::sage

STABLE_TORCH_LIBRARY_IMPL(video_attn, CPU, m) {
  using namespace video_attn::sage;
  m.impl("sage_quantize", TORCH_BOX(&quantize<EmulatedContext>));
  m.impl("sage_attention", TORCH_BOX(&attention<EmulatedContext>));
}

// See emulation::Options.
extern "C" __attribute__((visibility("default"))) void sage_emulation_options(int capability,
                                                                              bool late_copies,
                                                                              bool late_products,
                                                                              bool last_first) {
  video_attn::emulation::options = {capability, late_copies, late_products, last_first};
}
