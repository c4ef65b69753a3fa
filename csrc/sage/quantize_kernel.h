// The last launch of the quantizers: one tile of Q, K or V per block becomes codes and scales, and
// for Q the lse's shift and the mean of the tile are kept. The definition: quantize.py.
#pragma once

#include "elements.h"
#include "params.h"
#include "primitives.h"
#include "rotation.h"
#include "statistics_kernel.h"
#include "tiles.h"

namespace video_attn::sage {

// grid: tiles of the longer side, heads of V, K and Q one after the other, batch. The heads of V
// and K come last first: what StatisticsKernel has read last may still be in the L2 cache.
template <int kDim, QkCode kQk, VCode kV>
struct QuantizeKernel {
  using Params = QuantizeParams;
  static constexpr int kThreads = kDim;
  static constexpr int kSharedBytes = kVTileBytes<VCode::kFp8, kDim>;
  static constexpr int kBlocksPerProcessor = 512 / kThreads;
  static constexpr Feature kNeeds = kV == VCode::kFp8 ? Feature::kFp8 : Feature::kNone;

  VIDEO_ATTN_DEVICE static void run(const Params& p) {
    const int tile = static_cast<int>(block_index_x()), batch = block_index_z();
    const int of_kv = 2 * p.kv_heads - 1 - block_index_y();  // V above K; negative: Q
    if (tile >= tiles_in(of_kv < 0 ? p.q_side.length : p.kv_side.length)) return;
    if (of_kv < 0) {
      queries_to_codes(p, batch, -1 - of_kv, tile);
    } else if (of_kv < p.kv_heads) {
      keys_to_codes(p, batch, of_kv, tile);
    } else {
      values_to_codes(p, batch, of_kv - p.kv_heads, tile);
    }
  }

 private:
  using Rows = float[kGroupRows][kLaneChannels];

  // The rows of this thread, minus a mean unless it is null; zeros for tokens that do not count.
  VIDEO_ATTN_DEVICE static void load(Rows& x, const Tensor4& from, const int32_t* places,
                                     const Side& side, int batch, int head, int tile, int dim,
                                     const float* mean) {
    const int valid = valid_in_tile(side, batch, tile);
    float centre[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      centre[c] = mean == nullptr ? 0.0f : mean[Lane<kDim>::channel() + c];
    }
    Lane<kDim>::visit(from, places, batch, head, tile, valid, dim, [&](int r, const float (&y)[8]) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        x[r][c] = Lane<kDim>::row(r) < valid ? y[c] - centre[c] : 0.0f;
      }
    });
  }

  VIDEO_ATTN_DEVICE static void queries_to_codes(const Params& p, int batch, int head, int tile) {
    const int64_t index = static_cast<int64_t>(batch) * p.heads + head;
    Rows x;
    load(x, p.q, p.places, p.q_side, batch, head, tile, p.head_dim, nullptr);
    if (p.smooth_k) {
      const int kv_head = head / (p.heads / p.kv_heads);
      store_lse_shift(p, x, k_mean(p, static_cast<int64_t>(batch) * p.kv_heads + kv_head), index,
                      tile);
    }
    const int64_t i = index * tiles_in(p.q_side.length) + tile;
    if (p.score_shift != nullptr) {
      take_out_mean(x, valid_in_tile(p.q_side, batch, tile), q_mean(p, i));
    }
    if (p.rotation > 0) rotate<kDim>(x, p.rotation);
    store_codes<true>(x, p.q_groups, p.q_codes + i * kQkTileBytes<kDim>,
                      p.q_scale + i * p.q_groups);
  }

  VIDEO_ATTN_DEVICE static void keys_to_codes(const Params& p, int batch, int head, int tile) {
    const int64_t index = static_cast<int64_t>(batch) * p.kv_heads + head;
    Rows x;
    load(x, p.k, p.places, p.kv_side, batch, head, tile, p.head_dim,
         p.smooth_k ? k_mean(p, index) : nullptr);
    if (p.rotation > 0) rotate<kDim>(x, p.rotation);
    const int64_t i = index * tiles_in(p.kv_side.length) + tile;
    store_codes<false>(x, p.k_groups, p.k_codes + i * kQkTileBytes<kDim>,
                       p.k_scale + i * p.k_groups);
  }

  // Codes and scales of one tile of Q or K.
  template <bool kIsQuery>
  VIDEO_ATTN_DEVICE static void store_codes(const Rows& x, int groups, uint8_t* codes,
                                            float* scales) {
    auto* amax = reinterpret_cast<uint32_t*>(shared_memory());
    auto* inverse = reinterpret_cast<float*>(amax + kTile);
    const int channel = Lane<kDim>::channel();
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      const uint32_t row_amax = max_over_row(x[r]);
      if (channel == 0) amax[Lane<kDim>::row(r)] = row_amax;
    }
    block_barrier();
    if (thread_index() < kTile) {
      const int row = thread_index();
      const ScalePair pair = scale_pair(max_over_group<kIsQuery>(amax, row, groups),
                                        kQk == QkCode::kInt8 ? 127.0f : 448.0f);
      inverse[row] = pair.inverse;
      const int group = kIsQuery ? q_group(groups, row) : k_group(groups, row);
      scales[group] = pair.scale;  // all rows of a group write the same
    }
    block_barrier();
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      const int row = Lane<kDim>::row(r);
      const int offset = chunk_offset<kDim>(row, channel / 16) + channel % 16;
      *reinterpret_cast<Words2*>(codes + offset) = {
          {four_codes(x[r], 0, inverse[row]), four_codes(x[r], 4, inverse[row])}};
    }
  }

  VIDEO_ATTN_DEVICE static uint32_t four_codes(const float (&x)[kLaneChannels], int first,
                                               float inverse) {
    float y[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) y[c] = scaled(x[first + c], inverse);
    if constexpr (kQk == QkCode::kFp8) {
      return pack_fp8(y[0], y[1], y[2], y[3]);
    } else {
      uint32_t word = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) word |= (round_to_int8(y[c]) & 0xFF) << (c * 8);
      return word;
    }
  }

  VIDEO_ATTN_DEVICE static uint32_t max_over_row(const float (&x)[kLaneChannels]) {
    uint32_t largest = 0;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) largest = larger(largest, magnitude(x[c]));
#pragma unroll
    for (int mask = 1; mask < Lane<kDim>::kLanes; mask *= 2) {
      largest = larger(largest, shuffle_xor(largest, mask));
    }
    return largest;
  }

  // The largest of the rows that share a scale with `row`, which is this thread: rows whose numbers
  // differ in certain bits, the lowest five of which say a lane (tiles.h, q_group and k_group).
  template <bool kIsQuery>
  VIDEO_ATTN_DEVICE static uint32_t max_over_group(const uint32_t* amax, int row, int groups) {
    const int bits = groups == 1 ? 63 : !kIsQuery ? 1 | 8 | 16 | 32 : groups == 4 ? 15 : 8;
    uint32_t largest = larger(amax[row], amax[row ^ (bits & 32)]);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      const uint32_t other = shuffle_xor(largest, mask);
      if (bits & mask) largest = larger(largest, other);
    }
    return largest;
  }

  VIDEO_ATTN_DEVICE static uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

  // What K minus its mean leaves out of the scores of a query: scale * (q . mean).
  VIDEO_ATTN_DEVICE static void store_lse_shift(const Params& p, const Rows& x, const float* mean,
                                                int64_t head, int tile) {
    float centre[kLaneChannels], dot[kGroupRows];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) centre[c] = mean[Lane<kDim>::channel() + c];
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      dot[r] = 0.0f;
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        dot[r] = fused_multiply_add(x[r][c], centre[c], dot[r]);
      }
#pragma unroll
      for (int mask = 1; mask < Lane<kDim>::kLanes; mask *= 2) {
        dot[r] += shuffle_xor(dot[r], mask);
      }
    }
    if (Lane<kDim>::channel() != 0) return;
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      const int token = tile * kTile + Lane<kDim>::row(r);
      if (token < p.q_side.length) {
        p.lse_shift[head * p.q_side.length + token] = dot[r] * p.scale;
      }
    }
  }

  // Of the valid rows of a tile: stored, and subtracted. Rows that do not count are zeros and stay.
  VIDEO_ATTN_DEVICE static void take_out_mean(Rows& x, int valid, float* mean) {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    static_assert(kRowGroups * kDim * static_cast<int>(sizeof(float)) <= kSharedBytes);
    const int channel = Lane<kDim>::channel();
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      float sum = 0.0f;
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) sum += x[r][c];
      shared[Lane<kDim>::group() * kDim + channel + c] = sum;
    }
    block_barrier();
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      float sum = 0.0f;
#pragma unroll
      for (int group = 0; group < kRowGroups; ++group) sum += shared[group * kDim + channel + c];
      const float centre = valid > 0 ? divide(sum, static_cast<float>(valid)) : 0.0f;
      if (Lane<kDim>::group() == 0) mean[channel + c] = centre;
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
        if (Lane<kDim>::row(r) < valid) x[r][c] -= centre;
      }
    }
    block_barrier();  // shared memory is used again
  }

  VIDEO_ATTN_DEVICE static void values_to_codes(const Params& p, int batch, int head, int tile) {
    const int64_t index = static_cast<int64_t>(batch) * p.kv_heads + head;
    float inverse[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      inverse[c] = v_inverse(p, index)[Lane<kDim>::channel() + c];
    }
    Rows x;
    load(x, p.v, p.places, p.kv_side, batch, head, tile, p.head_dim_v,
         p.smooth_v ? p.v_mean + index * kDim : nullptr);
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) x[r][c] = scaled(x[r][c], inverse[c]);
    }
    const int64_t i = index * tiles_in(p.kv_side.length) + tile;
    uint8_t* codes = p.v_codes + i * kVTileBytes<kV, kDim>;
    if constexpr (kV == VCode::kFloat16) {
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
        const int offset = v16_offset(Lane<kDim>::row(r), Lane<kDim>::channel() / 8);
        *reinterpret_cast<Words4*>(codes + offset) = {
            {pack_half2(x[r][0], x[r][1]), pack_half2(x[r][2], x[r][3]),
             pack_half2(x[r][4], x[r][5]), pack_half2(x[r][6], x[r][7])}};
      }
    } else {
      transpose(x, codes);
    }
  }

  // Where 16 tokens of a channel wait in shared memory, so that neither the eight neighbouring
  // channels of a thread nor the neighbouring bytes of the tile meet in a bank.
  VIDEO_ATTN_DEVICE static int waiting_place(int channel, int chunk) {
    return (channel ^ (channel >> 5 & 1)) * kTile + (chunk ^ (channel >> 3 & 3)) * 16;
  }

  // A tile of V in FP8, rows of tokens: by way of shared memory, written 16 bytes per thread.
  VIDEO_ATTN_DEVICE static void transpose(const Rows& x, uint8_t* codes) {
    uint8_t* shared = shared_memory();
    const int chunk = Lane<kDim>::group() / 2, half = Lane<kDim>::group() % 2;
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      const int place = waiting_place(Lane<kDim>::channel() + c, chunk) + half * 8;
      *reinterpret_cast<Words2*>(shared + place) = {{pack_fp8(x[0][c], x[1][c], x[4][c], x[5][c]),
                                                     pack_fp8(x[2][c], x[3][c], x[6][c], x[7][c])}};
    }
    block_barrier();
#pragma unroll
    for (int n = 0; n < kTile / 16; ++n) {  // of all 16-byte pieces, every kThreads-th
      const int piece = n * kThreads + thread_index();
      const int channel = piece / 4, other = piece % 4;
      const int offset = chunk_offset<kTile>(channel, other);
      *reinterpret_cast<Words4*>(codes + offset) =
          *reinterpret_cast<const Words4*>(shared + waiting_place(channel, other));
    }
  }
};

}  // namespace video_attn::sage
