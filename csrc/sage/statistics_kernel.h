// What quantizing a tile must know of whole channels, the first two launches of the quantizers:
//
//   StatisticsKernel  sums and extremes of K and V over chunks of the sequence, per channel
//   FinishKernel      from them the mean of K, and the mean and scale of V
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

// Workspace: the partial results of the chunks, the mean of K, the inverse scale of V, and with
// smooth_q the mean of every tile of Q.
struct ChannelStatistics {
  float sum, largest, smallest;
  uint32_t amax_bits;  // as integers NaN > inf > everything finite, so nothing strange is lost
};

VIDEO_ATTN_HOST_DEVICE inline int chunks_of(const QuantizeParams& p) {
  return (tiles_in(p.kv_side.length) + kChunkTiles - 1) / kChunkTiles;
}

VIDEO_ATTN_HOST_DEVICE inline int64_t channels_of(const QuantizeParams& p) {
  return static_cast<int64_t>(p.batch) * p.kv_heads * p.padded_dim;
}

VIDEO_ATTN_HOST_DEVICE inline int64_t statistics_size(const QuantizeParams& p) {
  return channels_of(p) * (2 * chunks_of(p) * 4 + 2);  // in floats
}

VIDEO_ATTN_HOST_DEVICE inline int64_t q_means_size(const QuantizeParams& p) {
  if (p.score_shift == nullptr) return 0;
  return static_cast<int64_t>(p.batch) * p.heads * tiles_in(p.q_side.length) * p.padded_dim;
}

VIDEO_ATTN_DEVICE ChannelStatistics* partial(const QuantizeParams& p, int role, int64_t head,
                                             int chunk) {
  const int64_t heads = static_cast<int64_t>(p.batch) * p.kv_heads;
  return reinterpret_cast<ChannelStatistics*>(p.workspace) +
         ((role * heads + head) * chunks_of(p) + chunk) * p.padded_dim;
}

VIDEO_ATTN_DEVICE float* k_mean(const QuantizeParams& p, int64_t head) {
  return p.workspace + channels_of(p) * 2 * chunks_of(p) * 4 + head * p.padded_dim;
}

VIDEO_ATTN_DEVICE float* v_inverse(const QuantizeParams& p, int64_t head) {
  return k_mean(p, 0) + channels_of(p) + head * p.padded_dim;
}

// `tile`: counted over all heads and batches.
VIDEO_ATTN_DEVICE float* q_mean(const QuantizeParams& p, int64_t tile) {
  return p.workspace + statistics_size(p) + tile * p.padded_dim;
}

VIDEO_ATTN_DEVICE uint32_t magnitude(float x) { return as_bits(x) & 0x7FFFFFFFu; }

struct ScalePair {
  float scale, inverse;
};

// amax / limit and limit / amax; zeros below 2^-100, inf or NaN and 0 for such an amax.
VIDEO_ATTN_DEVICE ScalePair scale_pair(uint32_t amax_bits, float limit) {
  const float amax = from_bits(amax_bits);
  if (amax_bits >= kInfinityBits) return {amax, 0.0f};
  if (amax < kSmallestAmax) return {0.0f, 0.0f};
  return {divide(amax, limit), divide(limit, amax)};
}

// The power of two that brings amax into [256, 512), and its inverse.
VIDEO_ATTN_DEVICE ScalePair power_of_two_pair(uint32_t amax_bits) {
  const float amax = from_bits(amax_bits);
  if (amax_bits >= kInfinityBits) return {amax, 0.0f};
  if (amax < kSmallestAmax) return {0.0f, 0.0f};
  const int shift = static_cast<int>(amax_bits >> 23) - 126 - 9;
  return {from_bits(static_cast<uint32_t>(127 + shift) << 23),
          from_bits(static_cast<uint32_t>(127 - shift) << 23)};
}

// A value times an inverse scale; 0 where that is 0, whatever the value.
VIDEO_ATTN_DEVICE float scaled(float x, float inverse) {
  return inverse == 0.0f ? 0.0f : x * inverse;
}

template <int kDim>
struct Lane {
  static constexpr int kLanes = kDim / kLaneChannels;  // that share a row: 8 or 16
  VIDEO_ATTN_DEVICE static int group() { return thread_index() / kLanes; }
  VIDEO_ATTN_DEVICE static int channel() { return thread_index() % kLanes * kLaneChannels; }

  // Row `r` of this thread's eight: two runs of four, 8 apart, which are eight neighbouring bytes
  // of every channel of an FP8 tile of V (tiles.h, v_token).
  VIDEO_ATTN_DEVICE static int row(int r) {
    return group() / 2 * 16 + group() % 2 * 4 + r % 4 + r / 4 * 8;
  }

  // visit_rows of this thread's part of a tile of x; `places` as QuantizeParams has it.
  template <class Visit>
  VIDEO_ATTN_DEVICE static void visit(const Tensor4& x, const int32_t* places, int batch, int head,
                                      int tile, int valid, int dim, Visit visit_row) {
    const int64_t offset = batch * x.batch_stride + head * x.head_stride + channel();
    int32_t tokens[kGroupRows];
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) tokens[r] = row(r) < valid ? tile * kTile + row(r) : -1;
    if (places != nullptr) {
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
        if (tokens[r] >= 0) tokens[r] = places[tokens[r]];
      }
    }
    visit_rows(x.data, x.dtype, offset, x.token_stride, tokens, dim - channel(), visit_row);
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

  VIDEO_ATTN_DEVICE static void run(const Params& p) {
    const int role = block_index_z() / p.batch;
    if (role == 0) {
      if (p.smooth_k) gather<true, false>(p, p.k, p.head_dim);
    } else if (p.smooth_v) {
      gather<true, true>(p, p.v, p.head_dim_v);
    } else {
      gather<false, false>(p, p.v, p.head_dim_v);
    }
  }

  VIDEO_ATTN_DEVICE static void add(ChannelStatistics& to, const ChannelStatistics& x) {
    to.sum += x.sum;
    to.largest = maximum(to.largest, x.largest);
    to.smallest = -maximum(-to.smallest, -x.smallest);
    to.amax_bits = to.amax_bits > x.amax_bits ? to.amax_bits : x.amax_bits;
  }

 private:
  // Sums (K), the largest magnitudes (V), or sums and extremes (V with smooth_v).
  template <bool kSums, bool kExtremes>
  VIDEO_ATTN_DEVICE static void gather(const Params& p, const Tensor4& x, int dim) {
    const int chunk = static_cast<int>(block_index_x()), head = block_index_y();
    const int role = block_index_z() / p.batch, batch = block_index_z() % p.batch;
    ChannelStatistics mine[kLaneChannels];
#pragma unroll
    for (auto& channel : mine) channel = {0.0f, -kPlusInfinity, kPlusInfinity, 0u};
    for (int tile = chunk * kChunkTiles; tile < (chunk + 1) * kChunkTiles; ++tile) {
      if (tile >= tiles_in(p.kv_side.length)) break;
      const int valid = valid_in_tile(p.kv_side, batch, tile);
      const auto add_row = [&](int r, const float (&y)[8]) {
        const bool counts = Lane<kDim>::row(r) < valid;  // the others are zeros
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) {
          ChannelStatistics& to = mine[i];
          if (kSums) {
            to.sum += y[i];
          } else {
            const uint32_t bits = magnitude(y[i]);
            to.amax_bits = to.amax_bits > bits ? to.amax_bits : bits;
          }
          if (kExtremes && counts) {
            to.largest = maximum(to.largest, y[i]);
            to.smallest = -maximum(-to.smallest, -y[i]);
          }
        }
      };
      Lane<kDim>::visit(x, p.places, batch, head, tile, valid, dim, add_row);
    }
    auto* shared = reinterpret_cast<ChannelStatistics*>(shared_memory());
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
      shared[Lane<kDim>::group() * kDim + Lane<kDim>::channel() + i] = mine[i];
    }
    block_barrier();
    ChannelStatistics all = shared[thread_index()];
#pragma unroll
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

  VIDEO_ATTN_DEVICE static void run(const Params& p) {
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
      if (count > 0) {  // a mean that is not finite makes the largest difference so too
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

  VIDEO_ATTN_DEVICE static int valid_tokens(const Params& p, int batch) {
    if (p.kv_side.lens.data == nullptr) return p.kv_side.length;
    uint32_t count = 0;
    for (int tile = thread_index(); tile < tiles_in(p.kv_side.length); tile += kThreads) {
      count += valid_in_tile(p.kv_side, batch, tile);
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) count += shuffle_xor(count, mask);
    auto* of_warps = reinterpret_cast<uint32_t*>(shared_memory());
    if (thread_index() % 32 == 0) of_warps[thread_index() / 32] = count;
    block_barrier();
    count = 0;
    for (int i = 0; i < kThreads / 32; ++i) count += of_warps[i];
    return static_cast<int>(count);
  }
};

}  // namespace video_attn::sage
