// Component `sage`: the operators on CUDA tensors.
#include <torch/csrc/stable/accelerator.h>

#include "bindings/sage_operators.h"
#include "bindings/stream.h"

namespace video_attn::sage {
namespace {

struct CudaContext {
  explicit CudaContext(const Tensor& x)
      : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {
    int major = 0, minor = 0;
    const int device = x.get_device_index();
    STD_TORCH_CHECK(
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) ==
                cudaSuccess,
        "the compute capability of device ", device, " cannot be read");
    capability = major * 10 + minor;
  }

  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  int capability;
};

}  // namespace
}  // namespace video_attn::sage

STABLE_TORCH_LIBRARY_IMPL(video_attn, CUDA, m) {
  using namespace video_attn::sage;
  m.impl("sage_quantize", TORCH_BOX(&quantize<CudaContext>));
  m.impl("sage_attention", TORCH_BOX(&attention<CudaContext>));
}
