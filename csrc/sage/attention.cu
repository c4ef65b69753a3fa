#include "attention_launch.h"
#include "primitives_hopper.h"

namespace video_attn::sage {

const char* launch_attention(const AttentionParams& p, int capability, void* stream) {
  if (capability < 80) return "the Sage kernels need compute capability 8.0";
  if (p.v_code == VCode::kFp8 && capability < 89) return "FP8 needs compute capability 8.9";
  // Sums in fp16 save nothing on 9.0; who asks for them gets them from the mma.sync kernel.
  if (capability == 90 && !p.half_sums && has_warpgroup_code()) {
    return p.padded_dim == 64 ? launch_hopper_64(p, stream) : launch_hopper_128(p, stream);
  }
  return p.padded_dim == 64 ? launch_attention_64(p, stream) : launch_attention_128(p, stream);
}

}  // namespace video_attn::sage
