// Backward over blocks of 64 tokens.
#include "hopper/backward.h"

namespace video_attn::hopper {

size_t fine_backward_workspace(const BackwardParams& params) {
  return lay_out_workspace(params, false).bytes;
}

cudaError_t fine_backward(const BackwardParams& params, void* workspace, cudaStream_t stream) {
  return launch_backward<false>(params, workspace, stream);
}

}  // namespace video_attn::hopper
