// Forward attention by lists of blocks of at least 128 tokens, and dense.
#include "hopper/forward_kernel.h"
#include "hopper/launch.h"

namespace video_attn::hopper {

size_t coarse_forward_workspace(const ForwardParams& params) {
  return forward_workspace(params, Grain::kCoarse);
}

cudaError_t coarse_forward(const ForwardParams& params, void* workspace, cudaStream_t stream) {
  return launch_forward<Grain::kCoarse>(params, workspace, stream);
}

}  // namespace video_attn::hopper
