// The current CUDA stream of torch, from 2.10 on and without linking libtorch_cuda.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace video_attn {

// The one stable function for it below torch 2.13 lives in libtorch_cuda, which a CPU-only torch
// lacks; it is taken from the library that torch has loaded, so this component loads everywhere.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library
               ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
               : nullptr;
  }();
  STD_TORCH_CHECK(function != nullptr, "this PyTorch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace video_attn
