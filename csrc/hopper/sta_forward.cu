// Forward attention by lists of blocks of at least 128 tokens, and dense.
#include "hopper/forward_kernel.h"

namespace video_attn::hopper {

cudaError_t coarse_forward(const ForwardParams& params, const Allocate& allocate,
                           cudaStream_t stream) {
  return launch_forward<Grain::kCoarse>(params, allocate, stream);
}

}  // namespace video_attn::hopper
