// The launchers: component `sta` holds the coarse ones (blocks of at least 128 tokens, and dense
// attention), component `vsa` the fine ones (blocks of 64). Every one fills all of its results.
#pragma once

#include <cuda_runtime_api.h>

#include "hopper/params.h"

namespace video_attn::hopper {

// Bytes of device memory, 256-aligned, that the launcher of the same name needs as workspace. They
// depend on shapes only. The workspace comes uninitialised.
size_t coarse_forward_workspace(const ForwardParams& params);
size_t coarse_backward_workspace(const BackwardParams& params);
size_t fine_forward_workspace(const ForwardParams& params);
size_t fine_backward_workspace(const BackwardParams& params);

// Enqueue on `stream` of the current device: no host sync, no allocation, capturable in a graph.
cudaError_t coarse_forward(const ForwardParams& params, void* workspace, cudaStream_t stream);
cudaError_t coarse_backward(const BackwardParams& params, void* workspace, cudaStream_t stream);
cudaError_t fine_forward(const ForwardParams& params, void* workspace, cudaStream_t stream);
cudaError_t fine_backward(const BackwardParams& params, void* workspace, cudaStream_t stream);

}  // namespace video_attn::hopper
