// The launchers: component `sta` holds the coarse ones (blocks of at least 128 tokens, and dense
// attention), component `vsa` the fine ones (blocks of 64). Every one fills all of its results.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "hopper/params.h"

namespace video_attn::hopper {

// Gives bytes of device memory, uninitialised and 256-aligned. A launcher asks at most once, for
// all that its kernels hand to each other.
using Allocate = std::function<void*(size_t bytes)>;

// Enqueue on `stream` of the current device: no host sync, capturable in a graph.
cudaError_t coarse_forward(const ForwardParams& params, const Allocate& allocate,
                           cudaStream_t stream);
cudaError_t coarse_backward(const BackwardParams& params, const Allocate& allocate,
                            cudaStream_t stream);
cudaError_t fine_forward(const ForwardParams& params, const Allocate& allocate,
                         cudaStream_t stream);
cudaError_t fine_backward(const BackwardParams& params, const Allocate& allocate,
                          cudaStream_t stream);

}  // namespace video_attn::hopper
