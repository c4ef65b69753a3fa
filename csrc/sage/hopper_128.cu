#include "hopper_launch.h"

namespace video_attn::sage {

const char* launch_hopper_128(const AttentionParams& p, void* stream) {
  return launch_hopper<128>(p, stream);
}

}  // namespace video_attn::sage
