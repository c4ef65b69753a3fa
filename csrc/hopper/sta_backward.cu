// Backward over blocks of at least 128 tokens, and of dense attention.
#include "hopper/backward.h"

namespace video_attn::hopper {

size_t coarse_backward_workspace(const BackwardParams& params) {
  return lay_out_workspace(params, is_fused(params)).bytes;
}

cudaError_t coarse_backward(const BackwardParams& params, void* workspace, cudaStream_t stream) {
  return launch_backward<true>(params, workspace, stream);
}

}  // namespace video_attn::hopper
