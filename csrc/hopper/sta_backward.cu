// Backward over blocks of at least 128 tokens, and of dense attention.
#include "hopper/backward.h"

namespace video_attn::hopper {

cudaError_t coarse_backward(const BackwardParams& params, const Allocate& allocate,
                            cudaStream_t stream) {
  return launch_backward<true>(params, allocate, stream);
}

}  // namespace video_attn::hopper
