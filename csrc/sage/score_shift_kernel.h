// What queries without the mean of their tile leave out of the base-2 scores: that mean times every
// key, in fp32. The definition: quantize.py, _smooth_q. For an H100: one number per 64 queries and
// key is a 64th of the products of Q and K, but by the units that are not for matrices.
#pragma once

#include "params.h"
#include "primitives.h"
#include "statistics_kernel.h"
#include "tiles.h"

namespace video_attn::sage {

// grid: key tiles, heads, batch. A block keeps its keys in shared memory and takes all query tiles,
// four at a time per thread, with four keys.
template <int kDim>
struct ScoreShiftKernel {
  using Params = QuantizeParams;
  static constexpr int kThreads = kDim;
  static constexpr int kPitch = kDim + 4;  // floats: neighbouring rows in other banks
  static constexpr int kSharedBytes = kTile * kPitch * sizeof(float);
  static constexpr int kBlocksPerProcessor = 512 / kThreads;
  static constexpr Feature kNeeds = Feature::kNone;
  static constexpr int kSide = 4;              // keys and query tiles of a thread
  static constexpr int kKeys = kTile / kSide;  // threads beside each other along the keys
  static constexpr int kStep = kThreads / kKeys * kSide;  // query tiles at a time

  VIDEO_ATTN_DEVICE static void run(const Params& p) {
    const int key_tile = static_cast<int>(block_index_x());
    const int head = block_index_y(), batch = block_index_z();
    load_keys(p, batch, head / (p.heads / p.kv_heads), key_tile);
    block_barrier();
    const int tiles = tiles_in(p.q_side.length);
    const int64_t first = (static_cast<int64_t>(batch) * p.heads + head) * tiles;
    for (int tile = thread_index() / kKeys * kSide; tile < tiles; tile += kStep) {
      float sums[kSide][kSide] = {};
      multiply(sums, p, first, tile, tiles);
      const int key = key_tile * kTile + thread_index() % kKeys;
#pragma unroll
      for (int t = 0; t < kSide; ++t) {
        if (tile + t >= tiles) break;
        float* row = p.score_shift + (first + tile + t) * tiles_in(p.kv_side.length) * kTile + key;
#pragma unroll
        for (int k = 0; k < kSide; ++k) row[k * kKeys] = sums[t][k] * (p.scale * kLog2E);
      }
    }
  }

 private:
  static constexpr float kLog2E = 1.44269504f;

  // Keys minus their mean; zeros where they do not count.
  VIDEO_ATTN_DEVICE static void load_keys(const Params& p, int batch, int kv_head, int tile) {
    const int valid = valid_in_tile(p.kv_side, batch, tile), channel = Lane<kDim>::channel();
    const float* mean = k_mean(p, static_cast<int64_t>(batch) * p.kv_heads + kv_head) + channel;
    float centre[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) centre[c] = p.smooth_k ? mean[c] : 0.0f;
    auto* keys = reinterpret_cast<float*>(shared_memory()) + channel;
    const auto store_row = [&](int r, const float (&y)[kLaneChannels]) {
      const int row = Lane<kDim>::row(r);
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        keys[row * kPitch + c] = row < valid ? y[c] - centre[c] : 0.0f;
      }
    };
    Lane<kDim>::visit(p.k, p.places, batch, kv_head, tile, valid, p.head_dim, store_row);
  }

  // The means of query tiles from `tile` on times this thread's keys. A tile past the end is
  // computed from the last one and not stored.
  VIDEO_ATTN_DEVICE static void multiply(float (&sums)[kSide][kSide], const Params& p,
                                         int64_t first, int tile, int tiles) {
    const auto* keys = reinterpret_cast<const float*>(shared_memory());
    const float* means[kSide];
#pragma unroll
    for (int t = 0; t < kSide; ++t) {
      means[t] = q_mean(p, first + (tile + t < tiles ? tile + t : tiles - 1));
    }
    for (int channel = 0; channel < kDim; channel += 4) {
      float key[kSide][4], mean[kSide][4];
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        load_four(key[i], keys + (thread_index() % kKeys + i * kKeys) * kPitch + channel);
        load_four(mean[i], means[i] + channel);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int t = 0; t < kSide; ++t) {
#pragma unroll
          for (int k = 0; k < kSide; ++k) {
            sums[t][k] = fused_multiply_add(mean[t][c], key[k][c], sums[t][k]);
          }
        }
      }
    }
  }

  VIDEO_ATTN_DEVICE static void load_four(float (&x)[4], const float* from) {
    const Words4 words = *reinterpret_cast<const Words4*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = from_bits(words.w[i]);
  }
};

}  // namespace video_attn::sage
