// The quantizers: three launches that read q, k and v once or twice and write codes and scales.
//
//   StatisticsKernel  sums and extremes of K and V over chunks of the sequence, per channel
//   FinishKernel      from them the mean of K, and the mean and scale of V
//   QuantizeKernel    one tile of Q, K or V per block: codes, scales, and for Q the lse's shift
//
// The definition: quantize.py. Threads of a block: padded_dim, in eight groups of 8 rows of a tile;
// each thread has eight neighbouring channels, 16 bytes of a row of 16-bit elements.
#pragma once

#include "elements.h"
#include "params.h"
#include "primitives.h"
#include "tiles.h"

namespace video_attn::sage {

inline constexpr int kRowGroups = 8;
inline constexpr int kGroupRows = kTile / kRowGroups;
inline constexpr int kLaneChannels = 8;
inline constexpr int kChunkTiles = 8;
inline constexpr float kSmallestAmax = 7.888609052210118e-31f;  // 2^-100
inline constexpr uint32_t kInfinityBits = 0x7F800000u;
inline constexpr float kPlusInfinity = __builtin_inff();

// Workspace: the partial results of the chunks, then the mean of K and the inverse scale of V.
struct ChannelStatistics {
  float sum, largest, smallest;
  uint32_t amax_bits;  // as integers NaN > inf > everything finite, so nothing strange is lost
};

SAGE_HOST_DEVICE int chunks_of(const QuantizeParams& p) {
  return (tiles_in(p.kv_side.length) + kChunkTiles - 1) / kChunkTiles;
}

SAGE_HOST_DEVICE int64_t channels_of(const QuantizeParams& p) {
  return static_cast<int64_t>(p.batch) * p.kv_heads * p.padded_dim;
}

SAGE_HOST_DEVICE int64_t statistics_size(const QuantizeParams& p) {
  return channels_of(p) * (2 * chunks_of(p) * 4 + 2);  // in floats
}

SAGE_DEVICE ChannelStatistics* partial(const QuantizeParams& p, int role, int64_t head, int chunk) {
  const int64_t heads = static_cast<int64_t>(p.batch) * p.kv_heads;
  return reinterpret_cast<ChannelStatistics*>(p.workspace) +
         ((role * heads + head) * chunks_of(p) + chunk) * p.padded_dim;
}

SAGE_DEVICE float* k_mean(const QuantizeParams& p, int64_t head) {
  return p.workspace + channels_of(p) * 2 * chunks_of(p) * 4 + head * p.padded_dim;
}

SAGE_DEVICE float* v_inverse(const QuantizeParams& p, int64_t head) {
  return k_mean(p, 0) + channels_of(p) + head * p.padded_dim;
}

SAGE_DEVICE uint32_t magnitude(float x) { return as_bits(x) & 0x7FFFFFFFu; }

struct ScalePair {
  float scale, inverse;
};

// amax / limit and limit / amax; zeros below 2^-100, inf or NaN and 0 for such an amax.
SAGE_DEVICE ScalePair scale_pair(uint32_t amax_bits, float limit) {
  const float amax = from_bits(amax_bits);
  if (amax_bits >= kInfinityBits) return {amax, 0.0f};
  if (amax < kSmallestAmax) return {0.0f, 0.0f};
  return {divide(amax, limit), divide(limit, amax)};
}

// The power of two that brings amax into [256, 512), and its inverse.
SAGE_DEVICE ScalePair power_of_two_pair(uint32_t amax_bits) {
  const float amax = from_bits(amax_bits);
  if (amax_bits >= kInfinityBits) return {amax, 0.0f};
  if (amax < kSmallestAmax) return {0.0f, 0.0f};
  const int shift = static_cast<int>(amax_bits >> 23) - 126 - 9;
  return {from_bits(static_cast<uint32_t>(127 + shift) << 23),
          from_bits(static_cast<uint32_t>(127 - shift) << 23)};
}

// A value times an inverse scale; 0 where that is 0, whatever the value.
SAGE_DEVICE float scaled(float x, float inverse) { return inverse == 0.0f ? 0.0f : x * inverse; }

template <int kDim>
struct Lane {
  static constexpr int kLanes = kDim / kLaneChannels;  // that share a row: 8 or 16
  SAGE_DEVICE static int group() { return thread_index() / kLanes; }
  SAGE_DEVICE static int channel() { return thread_index() % kLanes * kLaneChannels; }

  // Row `r` of this thread's eight: two runs of four, 8 apart, which are eight neighbouring bytes
  // of every channel of an FP8 tile of V (tiles.h, v_token).
  SAGE_DEVICE static int row(int r) {
    return group() / 2 * 16 + group() % 2 * 4 + r % 4 + r / 4 * 8;
  }

  // visit_rows of this thread's part of a tile of x.
  template <class Visit>
  SAGE_DEVICE static void visit(const Tensor4& x, int batch, int head, int tile, int valid, int dim,
                                Visit visit_row) {
    const int64_t offset = batch * x.batch_stride + head * x.head_stride +
                           static_cast<int64_t>(tile) * kTile * x.token_stride + channel();
    visit_rows<kGroupRows>(
        x.data, x.dtype, offset, x.token_stride, valid, dim - channel(),
        [](int r) { return row(r); }, visit_row);
  }
};

// -- StatisticsKernel, FinishKernel ------------------------------------------------------------

// grid: chunks, kv heads, 2 * batch (K first)
template <int kDim>
struct StatisticsKernel {
  using Params = QuantizeParams;
  static constexpr int kThreads = kDim;
  static constexpr int kSharedBytes = kRowGroups * kDim * sizeof(ChannelStatistics);
  static constexpr int kBlocksPerProcessor = 512 / kThreads;
  static constexpr Feature kNeeds = Feature::kNone;

  SAGE_DEVICE static void run(const Params& p) {
    const int role = block_index_z() / p.batch;
    if (role == 0) {
      if (p.smooth_k) gather<true, false>(p, p.k, p.head_dim);
    } else if (p.smooth_v) {
      gather<true, true>(p, p.v, p.head_dim_v);
    } else {
      gather<false, true>(p, p.v, p.head_dim_v);
    }
  }

  SAGE_DEVICE static void add(ChannelStatistics& to, const ChannelStatistics& x) {
    to.sum += x.sum;
    to.largest = maximum(to.largest, x.largest);
    to.smallest = -maximum(-to.smallest, -x.smallest);
    to.amax_bits = to.amax_bits > x.amax_bits ? to.amax_bits : x.amax_bits;
  }

 private:
  // Sums, the largest magnitudes, or with both also the extremes: K, V, and V with smooth_v.
  template <bool kSums, bool kMagnitudes>
  SAGE_DEVICE static void gather(const Params& p, const Tensor4& x, int dim) {
    const int chunk = static_cast<int>(block_index_x()), head = block_index_y();
    const int role = block_index_z() / p.batch, batch = block_index_z() % p.batch;
    ChannelStatistics mine[kLaneChannels];
    SAGE_UNROLL
    for (auto& channel : mine) channel = {0.0f, -kPlusInfinity, kPlusInfinity, 0u};
    for (int tile = chunk * kChunkTiles; tile < (chunk + 1) * kChunkTiles; ++tile) {
      if (tile >= tiles_in(p.kv_side.length)) break;
      const int valid = valid_in_tile(p.kv_side, batch, tile);
      Lane<kDim>::visit(x, batch, head, tile, valid, dim, [&](int r, const float (&y)[8]) {
        const bool counts = Lane<kDim>::row(r) < valid;  // the others are zeros
        SAGE_UNROLL
        for (int i = 0; i < kLaneChannels; ++i) {
          ChannelStatistics& to = mine[i];
          if (kSums) to.sum += y[i];
          if (kMagnitudes) {
            const uint32_t bits = magnitude(y[i]);
            to.amax_bits = to.amax_bits > bits ? to.amax_bits : bits;
          }
          if (kSums && kMagnitudes && counts) {
            to.largest = maximum(to.largest, y[i]);
            to.smallest = -maximum(-to.smallest, -y[i]);
          }
        }
      });
    }
    auto* shared = reinterpret_cast<ChannelStatistics*>(shared_memory());
    SAGE_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) {
      shared[Lane<kDim>::group() * kDim + Lane<kDim>::channel() + i] = mine[i];
    }
    block_barrier();
    ChannelStatistics all = shared[thread_index()];
    SAGE_UNROLL
    for (int i = 1; i < kRowGroups; ++i) add(all, shared[i * kDim + thread_index()]);
    partial(p, role, static_cast<int64_t>(batch) * p.kv_heads + head, chunk)[thread_index()] = all;
  }
};

// grid: kv heads, batch, 2 (K first); four threads per channel, which share the chunks
template <int kDim>
struct FinishKernel {
  using Params = QuantizeParams;
  static constexpr int kSharers = 4;
  static constexpr int kThreads = kSharers * kDim;
  static constexpr int kSharedBytes = kThreads * sizeof(ChannelStatistics);
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr Feature kNeeds = Feature::kNone;

  SAGE_DEVICE static void run(const Params& p) {
    const int batch = block_index_y(), role = block_index_z(), channel = thread_index() % kDim;
    const int64_t head = static_cast<int64_t>(batch) * p.kv_heads + block_index_x();
    if (role == 0 && !p.smooth_k) return;
    const int count = valid_tokens(p, batch);
    ChannelStatistics all{0.0f, -kPlusInfinity, kPlusInfinity, 0u};
    for (int chunk = thread_index() / kDim; chunk < chunks_of(p); chunk += kSharers) {
      StatisticsKernel<kDim>::add(all, partial(p, role, head, chunk)[channel]);
    }
    auto* shared = reinterpret_cast<ChannelStatistics*>(shared_memory());
    block_barrier();
    shared[thread_index()] = all;
    block_barrier();
    if (thread_index() >= kDim) return;
    for (int i = 1; i < kSharers; ++i) {
      StatisticsKernel<kDim>::add(all, shared[i * kDim + channel]);
    }
    const float mean = count > 0 ? divide(all.sum, static_cast<float>(count)) : 0.0f;
    if (role == 0) {
      k_mean(p, head)[channel] = mean;
      return;
    }
    uint32_t amax_bits = all.amax_bits;
    if (p.smooth_v) {
      p.v_mean[head * kDim + channel] = mean;
      if (count > 0 && amax_bits < kInfinityBits) {
        const uint32_t above = magnitude(all.largest - mean),
                       below = magnitude(all.smallest - mean);
        amax_bits = above > below ? above : below;
      }
    }
    const ScalePair pair = p.v_code == VCode::kFloat16 ? power_of_two_pair(amax_bits)
                                                       : scale_pair(amax_bits, p.v_limit);
    p.v_scale[head * kDim + channel] = pair.scale;
    v_inverse(p, head)[channel] = pair.inverse;
  }

  SAGE_DEVICE static int valid_tokens(const Params& p, int batch) {
    if (p.kv_side.lens.data == nullptr) return p.kv_side.length;
    uint32_t count = 0;
    for (int tile = thread_index(); tile < tiles_in(p.kv_side.length); tile += kThreads) {
      count += valid_in_tile(p.kv_side, batch, tile);
    }
    SAGE_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) count += shuffle_xor(count, mask);
    auto* of_warps = reinterpret_cast<uint32_t*>(shared_memory());
    if (thread_index() % 32 == 0) of_warps[thread_index() / 32] = count;
    block_barrier();
    count = 0;
    for (int i = 0; i < kThreads / 32; ++i) count += of_warps[i];
    return static_cast<int>(count);
  }
};

// -- QuantizeKernel ----------------------------------------------------------------------------

// grid: tiles of the longer side, heads of V, K and Q one after the other, batch. The heads of V
// and K come last first: what StatisticsKernel has read last may still be in the L2 cache.
template <int kDim, QkCode kQk, VCode kV>
struct QuantizeKernel {
  using Params = QuantizeParams;
  static constexpr int kThreads = kDim;
  static constexpr int kSharedBytes = kVTileBytes<VCode::kFp8, kDim>;
  static constexpr int kBlocksPerProcessor = 512 / kThreads;
  static constexpr Feature kNeeds = kV == VCode::kFp8 ? Feature::kFp8 : Feature::kNone;

  SAGE_DEVICE static void run(const Params& p) {
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
  SAGE_DEVICE static void load(Rows& x, const Tensor4& from, const Side& side, int batch, int head,
                               int tile, int dim, const float* mean) {
    const int valid = valid_in_tile(side, batch, tile);
    float centre[kLaneChannels];
    SAGE_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) {
      centre[c] = mean == nullptr ? 0.0f : mean[Lane<kDim>::channel() + c];
    }
    Lane<kDim>::visit(from, batch, head, tile, valid, dim, [&](int r, const float (&y)[8]) {
      SAGE_UNROLL
      for (int c = 0; c < kLaneChannels; ++c) {
        x[r][c] = Lane<kDim>::row(r) < valid ? y[c] - centre[c] : 0.0f;
      }
    });
  }

  SAGE_DEVICE static void queries_to_codes(const Params& p, int batch, int head, int tile) {
    const int64_t index = static_cast<int64_t>(batch) * p.heads + head;
    Rows x;
    load(x, p.q, p.q_side, batch, head, tile, p.head_dim, nullptr);
    if (p.smooth_k) {
      const int kv_head = head / (p.heads / p.kv_heads);
      store_lse_shift(p, x, k_mean(p, static_cast<int64_t>(batch) * p.kv_heads + kv_head), index,
                      tile);
    }
    const int64_t i = index * tiles_in(p.q_side.length) + tile;
    store_codes<true>(x, p.q_groups, p.q_codes + i * kQkTileBytes<kDim>,
                      p.q_scale + i * p.q_groups);
  }

  SAGE_DEVICE static void keys_to_codes(const Params& p, int batch, int head, int tile) {
    const int64_t index = static_cast<int64_t>(batch) * p.kv_heads + head;
    Rows x;
    load(x, p.k, p.kv_side, batch, head, tile, p.head_dim, p.smooth_k ? k_mean(p, index) : nullptr);
    const int64_t i = index * tiles_in(p.kv_side.length) + tile;
    store_codes<false>(x, p.k_groups, p.k_codes + i * kQkTileBytes<kDim>,
                       p.k_scale + i * p.k_groups);
  }

  // Codes and scales of one tile of Q or K.
  template <bool kIsQuery>
  SAGE_DEVICE static void store_codes(const Rows& x, int groups, uint8_t* codes, float* scales) {
    auto* amax = reinterpret_cast<uint32_t*>(shared_memory());
    auto* inverse = reinterpret_cast<float*>(amax + kTile);
    const int channel = Lane<kDim>::channel();
    SAGE_UNROLL
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
    SAGE_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      const int row = Lane<kDim>::row(r);
      const int offset = chunk_offset<kDim>(row, channel / 16) + channel % 16;
      *reinterpret_cast<Words2*>(codes + offset) = {
          {four_codes(x[r], 0, inverse[row]), four_codes(x[r], 4, inverse[row])}};
    }
  }

  SAGE_DEVICE static uint32_t four_codes(const float (&x)[kLaneChannels], int first,
                                         float inverse) {
    float y[4];
    SAGE_UNROLL
    for (int c = 0; c < 4; ++c) y[c] = scaled(x[first + c], inverse);
    if constexpr (kQk == QkCode::kFp8) {
      return pack_fp8(y[0], y[1], y[2], y[3]);
    } else {
      uint32_t word = 0;
      SAGE_UNROLL
      for (int c = 0; c < 4; ++c) word |= (round_to_int8(y[c]) & 0xFF) << (c * 8);
      return word;
    }
  }

  SAGE_DEVICE static uint32_t max_over_row(const float (&x)[kLaneChannels]) {
    uint32_t largest = 0;
    SAGE_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) largest = larger(largest, magnitude(x[c]));
    SAGE_UNROLL
    for (int mask = 1; mask < Lane<kDim>::kLanes; mask *= 2) {
      largest = larger(largest, shuffle_xor(largest, mask));
    }
    return largest;
  }

  // The largest of the rows that share a scale with `row`, which is this thread: rows whose numbers
  // differ in certain bits, the lowest five of which say a lane (tiles.h, q_group and k_group).
  template <bool kIsQuery>
  SAGE_DEVICE static uint32_t max_over_group(const uint32_t* amax, int row, int groups) {
    const int bits = groups == 1 ? 63 : !kIsQuery ? 1 | 8 | 16 | 32 : groups == 4 ? 15 : 8;
    uint32_t largest = larger(amax[row], amax[row ^ (bits & 32)]);
    SAGE_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) {
      const uint32_t other = shuffle_xor(largest, mask);
      if (bits & mask) largest = larger(largest, other);
    }
    return largest;
  }

  SAGE_DEVICE static uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

  // What K minus its mean leaves out of the scores of a query: scale * (q . mean).
  SAGE_DEVICE static void store_lse_shift(const Params& p, const Rows& x, const float* mean,
                                          int64_t head, int tile) {
    float centre[kLaneChannels], dot[kGroupRows];
    SAGE_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) centre[c] = mean[Lane<kDim>::channel() + c];
    SAGE_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      dot[r] = 0.0f;
      SAGE_UNROLL
      for (int c = 0; c < kLaneChannels; ++c) {
        dot[r] = fused_multiply_add(x[r][c], centre[c], dot[r]);
      }
      SAGE_UNROLL
      for (int mask = 1; mask < Lane<kDim>::kLanes; mask *= 2) {
        dot[r] += shuffle_xor(dot[r], mask);
      }
    }
    if (Lane<kDim>::channel() != 0) return;
    SAGE_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      const int token = tile * kTile + Lane<kDim>::row(r);
      if (token < p.q_side.length) {
        p.lse_shift[head * p.q_side.length + token] = dot[r] * p.scale;
      }
    }
  }

  SAGE_DEVICE static void values_to_codes(const Params& p, int batch, int head, int tile) {
    const int64_t index = static_cast<int64_t>(batch) * p.kv_heads + head;
    float inverse[kLaneChannels];
    SAGE_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) {
      inverse[c] = v_inverse(p, index)[Lane<kDim>::channel() + c];
    }
    Rows x;
    load(x, p.v, p.kv_side, batch, head, tile, p.head_dim_v,
         p.smooth_v ? p.v_mean + index * kDim : nullptr);
    SAGE_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      SAGE_UNROLL
      for (int c = 0; c < kLaneChannels; ++c) x[r][c] = scaled(x[r][c], inverse[c]);
    }
    const int64_t i = index * tiles_in(p.kv_side.length) + tile;
    uint8_t* codes = p.v_codes + i * kVTileBytes<kV, kDim>;
    if constexpr (kV == VCode::kFloat16) {
      SAGE_UNROLL
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
  SAGE_DEVICE static int waiting_place(int channel, int chunk) {
    return (channel ^ (channel >> 5 & 1)) * kTile + (chunk ^ (channel >> 3 & 3)) * 16;
  }

  // A tile of V in FP8, rows of tokens: by way of shared memory, written 16 bytes per thread.
  SAGE_DEVICE static void transpose(const Rows& x, uint8_t* codes) {
    uint8_t* shared = shared_memory();
    const int chunk = Lane<kDim>::group() / 2, half = Lane<kDim>::group() % 2;
    SAGE_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) {
      const int place = waiting_place(Lane<kDim>::channel() + c, chunk) + half * 8;
      *reinterpret_cast<Words2*>(shared + place) = {{pack_fp8(x[0][c], x[1][c], x[4][c], x[5][c]),
                                                     pack_fp8(x[2][c], x[3][c], x[6][c], x[7][c])}};
    }
    block_barrier();
    SAGE_UNROLL
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
