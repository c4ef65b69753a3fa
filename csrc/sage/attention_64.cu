#include "attention_launch.h"

namespace video_attn::sage {

const char* launch_attention_64(const AttentionParams& p, void* stream) {
  return launch_dim<64>(p, stream);
}

}  // namespace video_attn::sage
