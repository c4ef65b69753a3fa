// What a kernel needs of an architecture beyond compute capability 8.0.
#pragma once

namespace video_attn::sage {

enum class Feature {
  kNone,
  kFp8,         // 8.9 and up
  kWarpgroups,  // 9.0a alone
};

}  // namespace video_attn::sage
