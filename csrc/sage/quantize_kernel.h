// The quantizers: three launches that read q, k and v once or twice and write codes and scales.
//
//   StatisticsKernel  sums and extremes of K and V over chunks of the sequence, per channel
//   FinishKernel      from them the mean of K, and the mean and scale of V
//   QuantizeKernel    one tile of Q, K or V per block: codes, scales, and for Q the lse's shift
//
// The definition: quantize.py. Threads of a block: padded_dim, in four groups of 16 rows of a tile
// (or every fourth token); each thread has four neighbouring channels.
#pragma once

#include "elements.h"
#include "params.h"
#include "primitives.h"
#include "tiles.h"

namespace video_attn::sage {

inline constexpr int kRowGroups = 4;
inline constexpr int kGroupRows = kTile / kRowGroups;
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
  static constexpr int kLanes = kDim / 4;  // that share a row: 16 or 32
  SAGE_DEVICE static int group() { return thread_index() / kLanes; }
  SAGE_DEVICE static int channel() { return thread_index() % kLanes * 4; }
};

// -- StatisticsKernel, FinishKernel ------------------------------------------------------------

// grid: chunks, kv heads, 2 * batch (K first)
template <int kDim>
struct StatisticsKernel {
  using Params = QuantizeParams;
  static constexpr int kThreads = kDim;
  static constexpr int kSharedBytes = kRowGroups * kDim * sizeof(ChannelStatistics);
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr Feature kNeeds = Feature::kNone;

  SAGE_DEVICE static void run(const Params& p) {
    const int chunk = static_cast<int>(block_index_x()), head = block_index_y();
    const int role = block_index_z() / p.batch, batch = block_index_z() % p.batch;
    if (role == 0 && !p.smooth_k) return;
    const Tensor4& x = role == 0 ? p.k : p.v;
    const int channels = (role == 0 ? p.head_dim : p.head_dim_v) - Lane<kDim>::channel();
    const int64_t base = batch * x.batch_stride + head * x.head_stride + Lane<kDim>::channel();
    ChannelStatistics mine[4];
    SAGE_UNROLL
    for (int i = 0; i < 4; ++i) mine[i] = {0.0f, -kPlusInfinity, kPlusInfinity, 0u};
    for (int tile = chunk * kChunkTiles; tile < (chunk + 1) * kChunkTiles; ++tile) {
      if (tile >= tiles_in(p.kv_side.length)) break;
      const int first = Lane<kDim>::group() * kGroupRows;
      const int rows = valid_in_tile(p.kv_side, batch, tile) - first;
      if (rows <= 0) continue;
      float y[kGroupRows][4];
      load_rows(y, x.data, x.dtype,
                base + (static_cast<int64_t>(tile) * kTile + first) * x.token_stride,
                x.token_stride, rows, channels);
      SAGE_UNROLL
      for (int r = 0; r < kGroupRows; ++r) {
        if (r >= rows) continue;
        SAGE_UNROLL
        for (int i = 0; i < 4; ++i) add(mine[i], {y[r][i], y[r][i], y[r][i], magnitude(y[r][i])});
      }
    }
    auto* shared = reinterpret_cast<ChannelStatistics*>(shared_memory());
    SAGE_UNROLL
    for (int i = 0; i < 4; ++i)
      shared[Lane<kDim>::group() * kDim + Lane<kDim>::channel() + i] = mine[i];
    block_barrier();
    ChannelStatistics all = shared[thread_index()];
    SAGE_UNROLL
    for (int i = 1; i < kRowGroups; ++i) add(all, shared[i * kDim + thread_index()]);
    partial(p, role, static_cast<int64_t>(batch) * p.kv_heads + head, chunk)[thread_index()] = all;
  }

  SAGE_DEVICE static void add(ChannelStatistics& to, const ChannelStatistics& x) {
    to.sum += x.sum;
    to.largest = maximum(to.largest, x.largest);
    to.smallest = -maximum(-to.smallest, -x.smallest);
    to.amax_bits = to.amax_bits > x.amax_bits ? to.amax_bits : x.amax_bits;
  }
};

// grid: kv heads, batch, 2 (K first); kRowGroups threads per channel, which share the chunks
template <int kDim>
struct FinishKernel {
  using Params = QuantizeParams;
  static constexpr int kThreads = kRowGroups * kDim;
  static constexpr int kSharedBytes = kThreads * sizeof(ChannelStatistics);
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr Feature kNeeds = Feature::kNone;

  SAGE_DEVICE static void run(const Params& p) {
    const int batch = block_index_y(), role = block_index_z(), channel = thread_index() % kDim;
    const int64_t head = static_cast<int64_t>(batch) * p.kv_heads + block_index_x();
    if (role == 0 && !p.smooth_k) return;
    const int count = valid_tokens(p, batch);
    ChannelStatistics all{0.0f, -kPlusInfinity, kPlusInfinity, 0u};
    for (int chunk = thread_index() / kDim; chunk < chunks_of(p); chunk += kRowGroups) {
      StatisticsKernel<kDim>::add(all, partial(p, role, head, chunk)[channel]);
    }
    auto* shared = reinterpret_cast<ChannelStatistics*>(shared_memory());
    block_barrier();
    shared[thread_index()] = all;
    block_barrier();
    if (thread_index() >= kDim) return;
    for (int i = 1; i < kRowGroups; ++i) {
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
    int count = 0;
    for (int tile = thread_index(); tile < tiles_in(p.kv_side.length); tile += kThreads) {
      count += valid_in_tile(p.kv_side, batch, tile);
    }
    int* shared = reinterpret_cast<int*>(shared_memory());
    shared[thread_index()] = count;
    block_barrier();
    count = 0;
    for (int i = 0; i < kThreads; ++i) count += shared[i];
    return count;
  }
};

// -- QuantizeKernel ----------------------------------------------------------------------------

// grid: all tiles of Q, then of K, then of V
template <int kDim, QkCode kQk, VCode kV>
struct QuantizeKernel {
  using Params = QuantizeParams;
  static constexpr int kThreads = kDim;
  static constexpr int kSharedBytes = 2 * kTile * sizeof(uint32_t);
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr Feature kNeeds = kV == VCode::kFp8 ? Feature::kFp8 : Feature::kNone;

  SAGE_DEVICE static void run(const Params& p) {
    const int q_tiles = tiles_in(p.q_side.length), kv_tiles = tiles_in(p.kv_side.length);
    const int64_t all_q = static_cast<int64_t>(p.batch) * p.heads * q_tiles;
    const int64_t all_kv = static_cast<int64_t>(p.batch) * p.kv_heads * kv_tiles;
    int64_t i = block_index_x();
    if (i < all_q) {
      tokens_to_codes(p, p.q, p.q_side, p.heads, i, p.q_groups, true, p.q_codes, p.q_scale);
    } else if ((i -= all_q) < all_kv) {
      tokens_to_codes(p, p.k, p.kv_side, p.kv_heads, i, p.k_groups, false, p.k_codes, p.k_scale);
    } else {
      values_to_codes(p, i - all_kv);
    }
  }

 private:
  using Rows = float[kGroupRows][4];

  // The 16 rows of this thread's group in tile i of all tiles; zeros for tokens that do not count.
  SAGE_DEVICE static void load(Rows& x, const Tensor4& from, const Side& side, int heads, int dim,
                               int64_t i, const float* mean) {
    const int tiles = tiles_in(side.length);
    const int tile = static_cast<int>(i % tiles);
    const int64_t head = i / tiles;
    const int batch = static_cast<int>(head / heads);
    const int channel = Lane<kDim>::channel(), first = Lane<kDim>::group() * kGroupRows;
    const int valid = valid_in_tile(side, batch, tile);
    const int64_t base = batch * from.batch_stride + head % heads * from.head_stride + channel;
    float centre[4];
    SAGE_UNROLL
    for (int c = 0; c < 4; ++c) centre[c] = mean == nullptr ? 0.0f : mean[channel + c];
    load_rows(x, from.data, from.dtype,
              base + (static_cast<int64_t>(tile) * kTile + first) * from.token_stride,
              from.token_stride, valid - first, dim - channel);
    SAGE_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      SAGE_UNROLL
      for (int c = 0; c < 4; ++c) x[r][c] = first + r < valid ? x[r][c] - centre[c] : 0.0f;
    }
  }

  SAGE_DEVICE static void tokens_to_codes(const Params& p, const Tensor4& from, const Side& side,
                                          int heads, int64_t i, int groups, bool is_query,
                                          uint8_t* codes, float* scales) {
    const int tiles = tiles_in(side.length);
    const int64_t head = i / tiles;
    const bool shifts = is_query && p.smooth_k, smooths = !is_query && p.smooth_k;
    const int64_t kv_head = head / heads * p.kv_heads + head % heads / (p.heads / p.kv_heads);
    Rows x;
    load(x, from, side, heads, p.head_dim, i, smooths ? k_mean(p, head) : nullptr);
    if (shifts) store_lse_shift(p, x, k_mean(p, kv_head), head, static_cast<int>(i % tiles));
    auto* amax = reinterpret_cast<uint32_t*>(shared_memory());
    auto* inverse = reinterpret_cast<float*>(amax + kTile);
    const int first = Lane<kDim>::group() * kGroupRows, channel = Lane<kDim>::channel();
    SAGE_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      const uint32_t row_amax = max_over_row(x[r]);
      if (channel == 0) amax[first + r] = row_amax;
    }
    block_barrier();
    if (thread_index() < kTile) {
      const int row = thread_index();
      const int group = is_query ? q_group(groups, row) : k_group(groups, row);
      uint32_t group_amax = 0;
      bool is_first = true;
      for (int other = 0; other < kTile; ++other) {
        if ((is_query ? q_group(groups, other) : k_group(groups, other)) != group) continue;
        group_amax = group_amax > amax[other] ? group_amax : amax[other];
        is_first = is_first && other >= row;
      }
      const ScalePair pair = scale_pair(group_amax, kQk == QkCode::kInt8 ? 127.0f : 448.0f);
      inverse[row] = pair.inverse;
      if (is_first) scales[i * groups + group] = pair.scale;
    }
    block_barrier();
    SAGE_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      const int offset = chunk_offset<kDim>(first + r, channel / 16) + channel % 16;
      *reinterpret_cast<uint32_t*>(codes + i * kQkTileBytes<kDim> + offset) =
          four_codes(x[r], inverse[first + r]);
    }
  }

  SAGE_DEVICE static uint32_t four_codes(const float (&x)[4], float inverse) {
    float y[4];
    SAGE_UNROLL
    for (int c = 0; c < 4; ++c) y[c] = scaled(x[c], inverse);
    if constexpr (kQk == QkCode::kFp8) {
      return pack_fp8(y[0], y[1], y[2], y[3]);
    } else {
      uint32_t word = 0;
      SAGE_UNROLL
      for (int c = 0; c < 4; ++c) word |= (round_to_int8(y[c]) & 0xFF) << (c * 8);
      return word;
    }
  }

  SAGE_DEVICE static uint32_t max_over_row(const float (&x)[4]) {
    uint32_t largest = 0;
    SAGE_UNROLL
    for (int c = 0; c < 4; ++c) largest = largest > magnitude(x[c]) ? largest : magnitude(x[c]);
    SAGE_UNROLL
    for (int mask = 1; mask < Lane<kDim>::kLanes; mask *= 2) {
      const uint32_t other = shuffle_xor(largest, mask);
      largest = largest > other ? largest : other;
    }
    return largest;
  }

  // What K minus its mean leaves out of the scores of a query: scale * (q . mean).
  SAGE_DEVICE static void store_lse_shift(const Params& p, const Rows& x, const float* mean,
                                          int64_t head, int tile) {
    const int channel = Lane<kDim>::channel();
    SAGE_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      float dot = 0.0f;
      SAGE_UNROLL
      for (int c = 0; c < 4; ++c) dot = fused_multiply_add(x[r][c], mean[channel + c], dot);
      SAGE_UNROLL
      for (int mask = 1; mask < Lane<kDim>::kLanes; mask *= 2) dot += shuffle_xor(dot, mask);
      const int token = tile * kTile + Lane<kDim>::group() * kGroupRows + r;
      if (channel == 0 && token < p.q_side.length) {
        p.lse_shift[head * p.q_side.length + token] = dot * p.scale;
      }
    }
  }

  SAGE_DEVICE static void values_to_codes(const Params& p, int64_t i) {
    const int64_t head = i / tiles_in(p.kv_side.length);
    const int channel = Lane<kDim>::channel(), group = Lane<kDim>::group();
    Rows x;
    load(x, p.v, p.kv_side, p.kv_heads, p.head_dim_v, i,
         p.smooth_v ? p.v_mean + head * kDim : nullptr);
    SAGE_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float inverse = v_inverse(p, head)[channel + c];
      SAGE_UNROLL
      for (int r = 0; r < kGroupRows; ++r) x[r][c] = scaled(x[r][c], inverse);
    }
    uint8_t* codes = p.v_codes + i * kVTileBytes<kV, kDim>;
    if constexpr (kV == VCode::kFloat16) {
      SAGE_UNROLL
      for (int r = 0; r < kGroupRows; ++r) {
        const int offset = v16_offset(group * kGroupRows + r, channel / 8) + channel % 8 * 2;
        *reinterpret_cast<Words2*>(codes + offset) = {
            {pack_half2(x[r][0], x[r][1]), pack_half2(x[r][2], x[r][3])}};
      }
    } else {
      SAGE_UNROLL
      for (int c = 0; c < 4; ++c) {
        Words4 words;
        SAGE_UNROLL
        for (int w = 0; w < 4; ++w) {
          words.w[w] = pack_fp8(x[v_token(w * 4)][c], x[v_token(w * 4 + 1)][c],
                                x[v_token(w * 4 + 2)][c], x[v_token(w * 4 + 3)][c]);
        }
        *reinterpret_cast<Words4*>(codes + chunk_offset<kTile>(channel + c, group)) = words;
      }
    }
  }
};

}  // namespace video_attn::sage
