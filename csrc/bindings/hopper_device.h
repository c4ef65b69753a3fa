// Where the operators of the Hopper kernels run: the device of their tensors, torch's stream there.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings/hopper_operators.h"
#include "bindings/stream.h"

namespace video_attn::hopper {

struct CudaContext {
  CudaContext(const char* kernel, const Tensor& x)
      : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {
    const int device = x.get_device_index();
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    }
    STD_TORCH_CHECK(error == cudaSuccess, kernel, ": device ", device, " cannot be asked, ",
                    describe(error));
    // Code for sm_90a runs on nothing else.
    STD_TORCH_CHECK(major == 9 && minor == 0, kernel, " is for sm_90, device ", device, " is sm_",
                    major, minor);
  }

  static const char* describe(cudaError_t error) { return cudaGetErrorString(error); }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace video_attn::hopper
