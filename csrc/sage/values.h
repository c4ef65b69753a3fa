// P V of one key tile, by mma.sync: Values<VCode, kHalfSums>.
//
// The weights of a warp, p[n][i] as in scores.h, are at the same time the A operand of the second
// product. The products of a tile are summed afresh, in fp32 or fp16, and then added to the fp32
// accumulator in the same instruction that rescales it: out = out * keep + sum.
#pragma once

#include "params.h"
#include "primitives.h"
#include "tiles.h"

namespace video_attn::sage {

// A fresh sum of one 16 x 8 piece of P V.
template <bool kHalfSums>
struct TileSum;

template <>
struct TileSum<false> {
  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  VIDEO_ATTN_DEVICE float value(int i) const { return c[i]; }
};

template <>
struct TileSum<true> {
  uint32_t c[2] = {0u, 0u};
  VIDEO_ATTN_DEVICE float value(int i) const {
    return i % 2 ? high_half(c[i / 2]) : low_half(c[i / 2]);
  }
};

template <VCode kCode>
struct Values;

template <>
struct Values<VCode::kFloat16> {
  static constexpr int kExponent = 0;  // P is scaled by 2 to this power before it is rounded
  static constexpr int kSteps = 4;     // products over 16 keys
  static constexpr int kPieces = 2;    // of 8 channels, that one pass over the keys makes

  VIDEO_ATTN_DEVICE static void pack(uint32_t (&a)[kSteps][4], const float (&p)[kTile / 8][4]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&column)[4] = p[step * 2 + half];
        a[step][half * 2] = pack_half2(column[0], column[1]);
        a[step][half * 2 + 1] = pack_half2(column[2], column[3]);
      }
    }
  }

  // b[step]: the operands of both pieces, {piece 0: b0, b1, piece 1: b0, b1}.
  VIDEO_ATTN_DEVICE static void load(uint32_t (&b)[kSteps][4], const uint8_t* v, int pair,
                                     int lane) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load_matrices_transposed(b[step],
                               v + v16_offset(step * 16 + lane % 16, pair * 2 + lane / 16));
    }
  }

  template <bool kHalfSums>
  VIDEO_ATTN_DEVICE static void multiply(TileSum<kHalfSums>& sum, const uint32_t (&a)[kSteps][4],
                                         const uint32_t (&b)[kSteps][4], int piece) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      mma_fp16(sum.c, a[step], b[step][piece * 2], b[step][piece * 2 + 1]);
    }
  }
};

template <>
struct Values<VCode::kFp8> {
  static constexpr int kExponent = 8;  // 256, the largest power of two of e4m3fn
  static constexpr int kSteps = 2;     // products over 32 keys
  static constexpr int kPieces = 1;

  // Within 16 keys, position 4 t + j of the operand is token v_token(4 t + j): what lane t holds.
  VIDEO_ATTN_DEVICE static void pack(uint32_t (&a)[kSteps][4], const float (&p)[kTile / 8][4]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&left)[4] = p[step * 4 + half * 2];
        const float (&right)[4] = p[step * 4 + half * 2 + 1];
        a[step][half * 2] = pack_fp8(left[0], left[1], right[0], right[1]);
        a[step][half * 2 + 1] = pack_fp8(left[2], left[3], right[2], right[3]);
      }
    }
  }

  // b[0]: {step 0: b0, b1, step 1: b0, b1}.
  VIDEO_ATTN_DEVICE static void load(uint32_t (&b)[kSteps][4], const uint8_t* v, int piece,
                                     int lane) {
    load_matrices(b[0], v + chunk_offset<kTile>(piece * 8 + lane % 8, lane / 8));
  }

  template <bool kHalfSums>
  VIDEO_ATTN_DEVICE static void multiply(TileSum<kHalfSums>& sum, const uint32_t (&a)[kSteps][4],
                                         const uint32_t (&b)[kSteps][4], int) {
    mma_fp8(sum.c, a[0], b[0][0], b[0][1]);
    mma_fp8(sum.c, a[1], b[0][2], b[0][3]);
  }
};

// out[r][n][i] = out * keep[r][i / 2] + P V, for the tile of V at `v` in shared memory.
template <VCode kCode, bool kHalfSums, int kDim, int kRowTiles>
VIDEO_ATTN_DEVICE void multiply_values(float (&out)[kRowTiles][kDim / 8][4],
                                       const uint32_t (&a)[kRowTiles][Values<kCode>::kSteps][4],
                                       const float (&keep)[kRowTiles][2], const uint8_t* v) {
  using Kind = Values<kCode>;
  // Addresses that stayed in registers would push something else out.
  const int lane = static_cast<int>(computed_afresh(thread_index() % 32));
#pragma unroll
  for (int group = 0; group < kDim / 8 / Kind::kPieces; ++group) {
    uint32_t b[Kind::kSteps][4];
    Kind::load(b, v, group, lane);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int piece = 0; piece < Kind::kPieces; ++piece) {
        TileSum<kHalfSums> sum;
        Kind::multiply(sum, a[r], b, piece);
        float (&acc)[4] = out[r][group * Kind::kPieces + piece];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[i] = fused_multiply_add(acc[i], keep[r][i / 2], sum.value(i));
        }
      }
    }
  }
}

}  // namespace video_attn::sage
