// Elements of the caller's tensors: fp16, bf16 or fp32, neighbouring channels at a time, in as few
// accesses as their alignment allows.
#pragma once

#include "params.h"
#include "primitives.h"

namespace video_attn::sage {

struct alignas(16) Words4 {
  uint32_t w[4];
};

struct alignas(8) Words2 {
  uint32_t w[2];
};

VIDEO_ATTN_DEVICE float to_float(Element dtype, uint32_t bits) {
  return dtype == Element::kFloat16 ? half_to_float(static_cast<uint16_t>(bits))
                                    : from_bits(bits << 16);
}

VIDEO_ATTN_DEVICE uint32_t from_float(Element dtype, float x) {
  return dtype == Element::kFloat16 ? float_to_half(x) : float_to_bfloat16(x);
}

// Eight neighbouring channels, of which `count` exist, of some tokens: visit(r, values) for each r,
// with zeros where tokens[r] is negative and for channels that do not exist. `offset` is that of
// token 0, tokens lie `stride` elements apart. Where the channels are whole and aligned, 16 bytes
// are read at a time, and all are asked for before the first is waited for.
template <int kRows, class Visit>
VIDEO_ATTN_DEVICE void visit_rows(const void* data, Element dtype, int64_t offset, int64_t stride,
                                  const int32_t (&tokens)[kRows], int count, Visit visit) {
  const int size = dtype == Element::kFloat32 ? 4 : 2;
  const auto* bytes = static_cast<const uint8_t*>(data) + offset * size;
  const int64_t step = stride * size;
  const bool is_whole = count <= 0 || count >= 8;
  const auto exists = [&](int r) { return tokens[r] >= 0 && count > 0; };
  if (!is_whole || (reinterpret_cast<uintptr_t>(bytes) | step) % 16 != 0) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint8_t* element = bytes + tokens[r] * step + i * size;
        y[i] = !exists(r) || i >= count ? 0.0f
               : size == 4 ? *reinterpret_cast<const float*>(element)
                           : to_float(dtype, *reinterpret_cast<const uint16_t*>(element));
      }
      visit(r, y);
    }
  } else if (size == 4) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float y[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* place = reinterpret_cast<const Words4*>(bytes + tokens[r] * step) + half;
        const Words4 words = exists(r) ? *place : Words4{};
#pragma unroll
        for (int i = 0; i < 4; ++i) y[half * 4 + i] = from_bits(words.w[i]);
      }
      visit(r, y);
    }
  } else {
    Words4 words[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto* place = reinterpret_cast<const Words4*>(bytes + tokens[r] * step);
      words[r] = exists(r) ? *place : Words4{};
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        y[i] = to_float(dtype, words[r].w[i / 2] >> (i % 2 * 16) & 0xFFFFu);
      }
      visit(r, y);
    }
  }
}

// The first `count` of x to `offset` elements after `data`.
VIDEO_ATTN_DEVICE void store_four(const float (&x)[4], void* data, Element dtype, int64_t offset,
                                  int count) {
  const bool is_wide = dtype == Element::kFloat32;
  auto* bytes = static_cast<uint8_t*>(data) + offset * (is_wide ? 4 : 2);
  const bool is_whole = count >= 4 && reinterpret_cast<uintptr_t>(bytes) % (is_wide ? 16 : 8) == 0;
  if (is_whole && is_wide) {
    *reinterpret_cast<Words4*>(bytes) = {
        {as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])}};
  } else if (is_whole) {
    *reinterpret_cast<Words2*>(bytes) = {{from_float(dtype, x[0]) | from_float(dtype, x[1]) << 16,
                                          from_float(dtype, x[2]) | from_float(dtype, x[3]) << 16}};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= count) continue;
      if (is_wide) {
        reinterpret_cast<float*>(bytes)[i] = x[i];
      } else {
        reinterpret_cast<uint16_t*>(bytes)[i] = static_cast<uint16_t>(from_float(dtype, x[i]));
      }
    }
  }
}

}  // namespace video_attn::sage
