// Forward attention by lists of blocks of 64 tokens.
#include "hopper/forward_kernel.h"

namespace video_attn::hopper {

cudaError_t fine_forward(const ForwardParams& params, const Allocate& allocate,
                         cudaStream_t stream) {
  return launch_forward<Grain::kFine>(params, allocate, stream);
}

}  // namespace video_attn::hopper
