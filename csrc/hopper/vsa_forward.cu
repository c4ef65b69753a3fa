// Forward attention by lists of blocks of 64 tokens.
#include "hopper/forward_kernel.h"
#include "hopper/launch.h"

namespace video_attn::hopper {

size_t fine_forward_workspace(const ForwardParams& params) {
  return forward_workspace(params, Grain::kFine);
}

cudaError_t fine_forward(const ForwardParams& params, void* workspace, cudaStream_t stream) {
  return launch_forward<Grain::kFine>(params, workspace, stream);
}

}  // namespace video_attn::hopper
