// Attention over codes with mma.sync, compute capability 8.0 and up: one main loop for every
// variant.
//
// A block of four warps serves 64 * kRowTiles query rows of one head. Of every 64-row tile warp w
// holds rows 16 w to 16 w + 15. Key tiles come through two buffers: while one is computed, the next
// is copied. The definition that this follows step by step: quantized_reference.py.
#pragma once

#include "cursor.h"
#include "params.h"
#include "primitives.h"
#include "results.h"
#include "scores.h"
#include "softmax.h"
#include "tiles.h"
#include "values.h"

namespace video_attn::sage {

// kShifted: something is added to the scores (AttentionParams::score_shift).
template <QkCode kQk_, VCode kV_, bool kHalfSums_, int kDim_, int kRowTiles_, bool kShifted_>
struct AttentionConfig {
  static constexpr QkCode kQk = kQk_;
  static constexpr VCode kV = kV_;
  static constexpr bool kHalfSums = kHalfSums_;
  static constexpr int kDim = kDim_;  // padded head dim of Q, K and V
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr bool kShifted = kShifted_;

  static constexpr Feature kNeeds = kV == VCode::kFp8 ? Feature::kFp8 : Feature::kNone;
  static constexpr int kThreads = 128;
  static constexpr int kRows = kTile * kRowTiles;
  static constexpr int kQBytes = kRowTiles * kQkTileBytes<kDim>;
  static constexpr int kKBytes = kQkTileBytes<kDim>;
  static constexpr int kVBytes = kVTileBytes<kV, kDim>;
  static constexpr int kBuffers = 2;
  static constexpr int kFactorBytes = kRowTiles * kThreads / 4 * 4;  // a float for four lanes
  static constexpr int kWalkBytes = 128;  // the cursor and two tiles of it
  static constexpr int kSharedBytes =
      kQBytes + kBuffers * (kKBytes + kVBytes) + kFactorBytes + kWalkBytes;
  static_assert(ResultTile<kV, kDim>::kSharedBytes <= kSharedBytes);
  static_assert(kDim == 64 || kDim == 128, "rows of codes are 64 or 128 bytes");
  static_assert(kRowTiles == 1 || kRowTiles == 2);
};

template <class C>
class AttentionBlock {
  using Result = ResultTile<C::kV, C::kDim>;

 public:
  VIDEO_ATTN_DEVICE explicit AttentionBlock(const AttentionParams& p)
      : p_(p),
        batch_(block_index_z()),
        head_(block_index_y()),
        kv_head_(head_ / (p.heads / p.kv_heads)),
        // Causal rows at the end have most to do, so they start first.
        first_tile_(
            static_cast<int>(p.is_causal ? grid_size_x() - 1 - block_index_x() : block_index_x()) *
            C::kRowTiles),
        causal_offset_(p.kv_side.length - p.q_side.length),
        q_(shared_memory()) {}

  VIDEO_ATTN_DEVICE void run() {
    const int first_row = first_tile_ * kTile;
    int last_key = p_.kv_side.length - 1;
    if (p_.is_causal) {
      last_key = first_row + C::kRows - 1 + causal_offset_;
      if (last_key >= p_.kv_side.length) last_key = p_.kv_side.length - 1;
    }
    int valid = 0;
    for (int r = 0; r < C::kRowTiles; ++r) valid += valid_rows(r);
    if (valid > 0 && last_key >= 0) attend(first_row, last_key);
    store();
  }

 private:
  VIDEO_ATTN_DEVICE void attend(int first_row, int last_key) {
    copy_queries();
    load_query_factors();
    // Thread 0 walks the list, in shared memory: registers are short.
    auto* cursor = reinterpret_cast<TileCursor*>(q_ + C::kSharedBytes - C::kWalkBytes);
    auto* tiles = reinterpret_cast<KeyTile*>(cursor + 1);
    static_assert(sizeof(TileCursor) + C::kBuffers * sizeof(KeyTile) <= C::kWalkBytes);
    if (thread_index() == 0) {
      *cursor = TileCursor(p_, batch_, head_, first_row, last_key);
      for (int i = 0; i < C::kBuffers; ++i) tiles[i] = cursor->next(p_.kv_side, batch_);
    }
    block_barrier();
    KeyTile tile = tiles[0];
    if (tile.exists()) copy_keys(tile, 0);
    copy_async_commit();
    for (int buffer = 0; tile.exists(); buffer ^= 1) {
      const float k_scale = key_scale(tile);
      copy_async_wait_all();
      block_barrier();  // the tile is there, and nobody reads the other buffer any more
      const KeyTile following = tiles[buffer ^ 1];
      if (following.exists()) copy_keys(following, buffer ^ 1);
      copy_async_commit();
      if (thread_index() == 0) tiles[buffer] = cursor->next(p_.kv_side, batch_);
      step(tile, k_scale, buffer);
      tile = following;
    }
    copy_async_wait_all();  // of the queries, where there was no tile
  }

  // One key tile: scores, weights, values.
  VIDEO_ATTN_DEVICE void step(const KeyTile& tile, float k_scale, int buffer) {
    uint32_t weights[C::kRowTiles][Values<C::kV>::kSteps][4];
    float keep[C::kRowTiles][2];
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      float s[1][kTile / 8][4];
      multiply_scores<C::kQk, C::kDim>(s[0], q_ + r * kQkTileBytes<C::kDim>, keys(buffer));
      ScoreScale scale[1] = {{Scores<C::kQk>::kOffset, *factor(r) * k_scale}};
      const int last_key = p_.is_causal ? (first_tile_ + r) * kTile + causal_offset_ : kAllKeys;
      adjust_scores<C::kShifted>(s[0], scale[0], last_key, tile.index, tile.valid,
                                 shift(r, tile.index));
      weigh<Values<C::kV>::kExponent>(s, scale, state_[r], keep[r]);
      Values<C::kV>::pack(weights[r], s[0]);
    }
    multiply_values<C::kV, C::kHalfSums, C::kDim>(out_, weights, keep, values(buffer));
  }

  // -- loads ------------------------------------------------------------------------------------

  VIDEO_ATTN_DEVICE uint8_t* keys(int buffer) const {
    return q_ + C::kQBytes + buffer * (C::kKBytes + C::kVBytes);
  }
  VIDEO_ATTN_DEVICE uint8_t* values(int buffer) const { return keys(buffer) + C::kKBytes; }

  VIDEO_ATTN_DEVICE void copy_tile(uint8_t* shared, const uint8_t* codes, int64_t tile,
                                   int bytes) const {
    const uint8_t* global = codes + tile * bytes;
#pragma unroll
    for (int i = 0; i < bytes; i += C::kThreads * 16) {
      const int offset = i + thread_index() * 16;
      copy_async(shared + offset, global + offset);
    }
  }

  VIDEO_ATTN_DEVICE void copy_queries() const {
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      copy_tile(q_ + r * kQkTileBytes<C::kDim>, p_.q_codes, query_tile(r), kQkTileBytes<C::kDim>);
    }
  }

  // Row tile r; one past the end is computed from the last one and not stored.
  VIDEO_ATTN_DEVICE int64_t query_tile(int r) const {
    const int tiles = tiles_in(p_.q_side.length);
    const int tile = first_tile_ + r < tiles ? first_tile_ + r : tiles - 1;
    return (static_cast<int64_t>(batch_) * p_.heads + head_) * tiles + tile;
  }

  // What the scores of row tile r leave out, of every key of a tile.
  VIDEO_ATTN_DEVICE const float* shift(int r, int tile) const {
    if (!C::kShifted) return nullptr;
    const int64_t row = query_tile(r) * tiles_in(p_.kv_side.length) + tile;
    return p_.score_shift + row * kTile;
  }

  VIDEO_ATTN_DEVICE int64_t key_tile(int tile) const {
    return (static_cast<int64_t>(batch_) * p_.kv_heads + kv_head_) * tiles_in(p_.kv_side.length) +
           tile;
  }

  VIDEO_ATTN_DEVICE void copy_keys(const KeyTile& tile, int buffer) const {
    copy_tile(keys(buffer), p_.k_codes, key_tile(tile.index), C::kKBytes);
    copy_tile(values(buffer), p_.v_codes, key_tile(tile.index), C::kVBytes);
  }

  // Every granularity gives a lane one scale for its two rows of a tile, and one for its keys. The
  // former wait in shared memory: four lanes hold the same rows.
  VIDEO_ATTN_DEVICE float* factor(int r) const {
    // Addresses that stayed in registers would push something else out.
    const int thread = static_cast<int>(computed_afresh(thread_index()));
    return reinterpret_cast<float*>(keys(C::kBuffers)) + (r * C::kThreads + thread) / 4;
  }

  VIDEO_ATTN_DEVICE void load_query_factors() {
    if (thread_index() % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      const int group = q_group(p_.q_groups, row_in_tile(0));
      *factor(r) = p_.q_scale[query_tile(r) * p_.q_groups + group] * p_.scale_log2;
    }
  }

  VIDEO_ATTN_DEVICE float key_scale(const KeyTile& tile) const {
    const int group = k_group(p_.k_groups, thread_index() % 4 * 2);
    return p_.k_scale[key_tile(tile.index) * p_.k_groups + group];
  }

  // -- results ----------------------------------------------------------------------------------

  // Valid rows of a row tile; 0 past the end of the sequence.
  VIDEO_ATTN_DEVICE int valid_rows(int r) const {
    const int tile = first_tile_ + r;
    return tile < tiles_in(p_.q_side.length) ? valid_in_tile(p_.q_side, batch_, tile) : 0;
  }

  VIDEO_ATTN_DEVICE void store() const {
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      block_barrier();  // nobody reads any more what shared memory held before
      Result(p_, batch_, head_, first_tile_ + r)
          .store(out_[r], state_[r], reinterpret_cast<float*>(q_), 1);
    }
  }

  const AttentionParams& p_;
  const int batch_, head_, kv_head_, first_tile_, causal_offset_;
  uint8_t* const q_;
  RowState state_[C::kRowTiles];
  float out_[C::kRowTiles][C::kDim / 8][4] = {};
};

}  // namespace video_attn::sage
