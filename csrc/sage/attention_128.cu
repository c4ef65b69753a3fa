#include "attention_launch.h"

namespace video_attn::sage {

const char* launch_attention_128(const AttentionParams& p, void* stream) {
  return launch_dim<128>(p, stream);
}

}  // namespace video_attn::sage
