// Backward over blocks of 64 tokens.
#include "hopper/backward.h"

namespace video_attn::hopper {

cudaError_t fine_backward(const BackwardParams& params, const Allocate& allocate,
                          cudaStream_t stream) {
  return launch_backward<false>(params, allocate, stream);
}

}  // namespace video_attn::hopper
