// From the accumulators of 64 query rows to the output and the log-sum-exp.
#pragma once

#include "elements.h"
#include "params.h"
#include "primitives.h"
#include "softmax.h"
#include "tiles.h"
#include "values.h"

namespace video_attn::sage {

// One tile of rows, by the 128 threads that hold it.
template <VCode kV, int kDim>
class ResultTile {
 public:
  static constexpr int kPitch = kDim + 8;  // floats from row to row in shared memory
  static constexpr int kSharedBytes = kTile * (kPitch + 1) * sizeof(float);

  VIDEO_ATTN_DEVICE ResultTile(const AttentionParams& p, int batch, int head, int tile)
      : p_(p), batch_(batch), head_(head), tile_(tile) {}

  // Through shared memory, for whole lines to global memory. `shared` holds kSharedBytes, `barrier`
  // is the number of a barrier of these 128 threads alone.
  VIDEO_ATTN_DEVICE void store(const float (&acc)[kDim / 8][4], const RowState& state,
                               float* shared, int barrier) const {
    float* inverse = shared + kTile * kPitch;
    const int tiles = tiles_in(p_.q_side.length);
    const int valid = tile_ < tiles ? valid_in_tile(p_.q_side, batch_, tile_) : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = row_total(state.total[i]);
      const bool seen = row_in_tile(i) < valid && total != 0.0f;
      if (thread_index() % 4 == 0) {
        inverse[row_in_tile(i)] = seen ? divide(1.0f, total) : 0.0f;
        store_lse(i, seen, state.maximum[i], total);
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int channel = n * 8 + thread_index() % 4 * 2;
        *reinterpret_cast<Words2*>(shared + row_in_tile(i) * kPitch + channel) = {
            {as_bits(acc[n][i * 2]), as_bits(acc[n][i * 2 + 1])}};
      }
    }
    threads_sync<kGroupThreads>(barrier);
    store_rows(shared, inverse);
  }

 private:
  // acc / total * scale + mean, for every row; exact zeros for rows that see nothing.
  VIDEO_ATTN_DEVICE void store_rows(const float* rows, const float* inverse) const {
    constexpr int kLanes = kDim / 4;  // that share a row, four channels each
    const int thread = thread_index() % kGroupThreads, channel = thread % kLanes * 4;
    const int kv_head = head_ / (p_.heads / p_.kv_heads);
    const int64_t channels =
        (static_cast<int64_t>(batch_) * p_.kv_heads + kv_head) * kDim + channel;
    float scale[4], mean[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      scale[c] = p_.v_scale[channels + c];
      mean[c] = p_.v_mean == nullptr ? 0.0f : p_.v_mean[channels + c];
    }
    for (int row = thread / kLanes; row < kTile; row += kGroupThreads / kLanes) {
      int64_t token = static_cast<int64_t>(tile_) * kTile + row;
      if (token >= p_.q_side.length) break;
      if (p_.places != nullptr) token = p_.places[token];
      if (token < 0) continue;
      float x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float sum = rows[row * kPitch + channel + c];
        x[c] = inverse[row] == 0.0f ? 0.0f : sum * inverse[row] * scale[c] + mean[c];
      }
      const int64_t offset = batch_ * p_.out_batch_stride + head_ * p_.out_head_stride +
                             token * p_.out_token_stride + channel;
      store_four(x, p_.out, p_.out_dtype, offset, p_.head_dim_v - channel);
    }
  }

  VIDEO_ATTN_DEVICE void store_lse(int i, bool seen, float maximum, float total) const {
    const int64_t token = static_cast<int64_t>(tile_) * kTile + row_in_tile(i);
    if (token >= p_.q_side.length) return;
    const int64_t index =
        (static_cast<int64_t>(batch_) * p_.heads + head_) * p_.q_side.length + token;
    constexpr float kLn2 = 0.69314718f;
    constexpr float kExponent = static_cast<float>(Values<kV>::kExponent);
    float lse = (maximum + log2_fast(total) - kExponent) * kLn2;
    if (p_.lse_shift != nullptr) lse += p_.lse_shift[index];
    p_.lse[index] = seen ? lse : kMinusInfinity;
  }

  const AttentionParams& p_;
  const int batch_, head_, tile_;
};

}  // namespace video_attn::sage
