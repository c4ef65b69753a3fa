// Backward over blocks of at least 128 tokens, and of dense attention.
#include "hopper/backward.h"

namespace video_attn::hopper {

size_t coarse_backward_workspace(const BackwardParams& params) {
  return statistics_bytes(params.problem) + (is_fused(params) ? dq_sums_bytes(params.problem) : 0);
}

cudaError_t coarse_backward(const BackwardParams& params, void* workspace, cudaStream_t stream) {
  return launch_backward<true>(params, workspace, stream);
}

}  // namespace video_attn::hopper
