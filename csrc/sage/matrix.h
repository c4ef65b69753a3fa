// How a warpgroup's product finds an operand in shared memory: the 64 bits of a matrix descriptor
// (PTX manual, "Matrix Descriptor Format"), for tiles laid out as tiles.h says.
#pragma once

#include "primitives_hopper.h"
#include "tiles.h"

namespace video_attn::sage {

// `shared`: a shared_address. `leading` and `stride`: distances in bytes between the pieces of 8
// rows or columns that the hardware takes at a time. Rows have 64 or 128 bytes, swizzled.
template <int kRowBytes>
VIDEO_ATTN_DEVICE uint64_t descriptor(uint32_t shared, int leading, int stride) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3FFFF) >> 4); };
  return field(shared) | field(leading) << 16 | field(stride) << 32 | kSwizzle << 62;
}

// 32 channels of the Q or K codes that start at `tile`, from channel 32 * step on.
template <int kDim>
VIDEO_ATTN_DEVICE uint64_t token_matrix(uint32_t tile, int step) {
  return descriptor<kDim>(tile + step * 32, 0, 8 * kDim);
}

// 32 tokens of an FP8 tile of V, all channels.
VIDEO_ATTN_DEVICE uint64_t value_matrix_fp8(uint32_t tile, int step) {
  return descriptor<kTile>(tile + step * 32, 0, 8 * kTile);
}

// 16 tokens of an fp16 tile of V, all channels: panels of 64 channels side by side.
VIDEO_ATTN_DEVICE uint64_t value_matrix_fp16(uint32_t tile, int step) {
  constexpr int kTokenBytes = kPanelChannels * 2;
  return descriptor<kTokenBytes>(tile + step * 16 * kTokenBytes, kPanelBytes, 8 * kTokenBytes);
}

}  // namespace video_attn::sage
