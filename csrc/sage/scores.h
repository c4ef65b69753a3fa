// Q K^T of one key tile, by mma.sync: Scores<QkCode>.
//
// A warp holds, of each 64-row tile of its block, 16 rows: c[n][i] of lane l is
// row l / 4 (+ 8 for i >= 2), key 8 n + 2 (l % 4) + (i & 1).
#pragma once

#include "params.h"
#include "primitives.h"
#include "tiles.h"

namespace video_attn::sage {

template <QkCode kCode>
struct Scores;

// Sums of INT8 products start at the bits of 1.5 * 2^23. As long as |sum| < 2^22 = 4194304, which
// holds up to 127 * 127 * 256, the bits are then the float 1.5 * 2^23 + sum: no conversion needed,
// which would run at a quarter of the rate of arithmetic.
template <>
struct Scores<QkCode::kInt8> {
  using Sum = int32_t;
  static constexpr Sum kStart = 0x4B400000;
  static constexpr float kOffset = 12582912.0f;

  VIDEO_ATTN_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
    mma_int8(c, a, b0, b1);
  }
};

template <>
struct Scores<QkCode::kFp8> {
  using Sum = float;
  static constexpr Sum kStart = 0.0f;
  static constexpr float kOffset = 0.0f;

  VIDEO_ATTN_DEVICE static void multiply(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
    mma_fp8(c, a, b0, b1);
  }
};

// s[n][i] = kOffset + the products of the 64 queries at `q` and the 64 keys at `k`, both in shared
// memory. One row tile at a time: the fragments of K are loaded again for each, which shared memory
// has time for, and the scores of only one tile are in registers.
template <QkCode kCode, int kDim>
VIDEO_ATTN_DEVICE void multiply_scores(float (&s)[kTile / 8][4], const uint8_t* q,
                                       const uint8_t* k) {
  using Kind = Scores<kCode>;
  const int thread = static_cast<int>(computed_afresh(thread_index()));
  const int lane = thread % 32, warp = thread / 32;
  typename Kind::Sum c[kTile / 8][4];
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = Kind::kStart;
  }
#pragma unroll
  for (int step = 0; step < kDim / 64; ++step) {  // 64 channels: two products of 32
    uint32_t a[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + lane % 16, chunk = step * 4 + half * 2 + lane / 16;
      load_matrices(a[half], q + chunk_offset<kDim>(row, chunk));
    }
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
      uint32_t b[4];
      load_matrices(b, k + chunk_offset<kDim>(n * 8 + lane % 8, step * 4 + lane / 8));
      Kind::multiply(c[n], a[0], b[0], b[1]);
      Kind::multiply(c[n], a[1], b[2], b[3]);
    }
  }
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = as_float(c[n][i]);
  }
}

}  // namespace video_attn::sage
