// Attention over codes on compute capability 9.0a: products by warpgroups, copies by a warp of
// their own.
//
// A block serves 64 query rows per consumer warpgroup. Keys come two tiles (128 tokens) at a time
// through a ring in shared memory, which the producer warp keeps full with bulk copies: the codes
// lie in global memory as the products want them. The definition, with steps of two tiles:
// quantized_reference.py.
//
// One or two consumers have the products Q K^T of the next keys and P V of the last ones run while
// they turn scores into weights. Three have no registers for that: each goes from product to
// product, and the tensor cores work for the other two meanwhile.
#pragma once

#include <type_traits>

#include "device/ring.h"
#include "hopper_walk.h"
#include "matrix.h"
#include "params.h"
#include "primitives_hopper.h"
#include "results.h"
#include "scores.h"
#include "softmax.h"
#include "tiles.h"
#include "values.h"

namespace video_attn::sage {

inline constexpr int kStepTiles = 2;

// kShifted: something is added to the scores (AttentionParams::score_shift).
template <QkCode kQk_, VCode kV_, int kDim_, int kConsumers_, bool kShifted_>
struct HopperConfig {
  static constexpr QkCode kQk = kQk_;
  static constexpr VCode kV = kV_;
  static constexpr int kDim = kDim_;  // padded head dim of Q, K and V
  static constexpr int kConsumers = kConsumers_;
  static_assert(kConsumers >= 1 && kConsumers <= 3);
  static constexpr bool kShifted = kShifted_;
  static_assert(!kShifted || kConsumers == 1);

  // One consumer: two blocks share a multiprocessor, so that its tensor cores are never alone with
  // one softmax. More consumers: one block, and a half or a third of the copies.
  static constexpr int kBlocksPerProcessor = kConsumers == 1 ? 2 : 1;
  static constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = kConsumers == 1 ? 232 : kConsumers == 2 ? 240 : 160;
  static constexpr bool kOverlaps = kConsumers < 3;

  // The products of a step are summed afresh: the tensor cores add FP8 products with fewer digits
  // than fp32 has. Sums of fp16 products need no such care.
  static constexpr bool kFreshSums = kV == VCode::kFp8;
  static_assert(kOverlaps || !kFreshSums, "no registers for fresh sums beside the output");

  static constexpr int kQBytes = kConsumers * kQkTileBytes<kDim>;
  static constexpr int kKBytes = kStepTiles * kQkTileBytes<kDim>;
  static constexpr int kVBytes = kStepTiles * kVTileBytes<kV, kDim>;
  static constexpr int kRingBytes = (kConsumers == 1 ? 97 : 200) * 1024;
  static constexpr int kFitting = kRingBytes / (kKBytes + kVBytes);
  static constexpr int kStages = kFitting < 4 ? kFitting : 4;
  static_assert(kStages >= 2);
};

// One step over the keys, as the producer tells the consumers.
struct Step {
  int32_t index[kStepTiles];  // index[0] is -1 past the last step
  int32_t valid[kStepTiles];  // keys that count; 0 for a tile that only fills the step up
  float k_scale[kStepTiles][4];
};

struct ShiftedStep : Step {
  alignas(16) float shift[kStepTiles][kTile];  // of every key, for the rows of the consumer
};

template <class C>
struct HopperShared {
  using StepOf = std::conditional_t<C::kShifted, ShiftedStep, Step>;
  alignas(1024) uint8_t q[C::kQBytes];
  alignas(1024) uint8_t k[C::kStages][C::kKBytes];
  alignas(1024) uint8_t v[C::kStages][C::kVBytes];
  StepOf steps[C::kStages];
  MemoryBarrier q_full, k_full[C::kStages], k_empty[C::kStages], v_full[C::kStages],
      v_empty[C::kStages];
};

template <class C>
class HopperBlock {
  using Shared = HopperShared<C>;
  using Place = RingPlace<C::kStages>;

 public:
  VIDEO_ATTN_DEVICE explicit HopperBlock(const AttentionParams& p)
      : p_(p),
        batch_(block_index_z()),
        head_(block_index_y()),
        // Causal rows at the end have most to do, so they start first.
        first_tile_(
            static_cast<int>(p.is_causal ? grid_size_x() - 1 - block_index_x() : block_index_x()) *
            C::kConsumers),
        causal_offset_(p.kv_side.length - p.q_side.length),
        shared_(*reinterpret_cast<Shared*>(shared_memory())) {}

  VIDEO_ATTN_DEVICE void run() {
    if (thread_index() == 0) {
      constexpr int kConsumerWarps = C::kConsumers * 4;
      barrier_init(&shared_.q_full, 1);
      for (int i = 0; i < C::kStages; ++i) {
        barrier_init(&shared_.k_full[i], 1);
        barrier_init(&shared_.v_full[i], 1);
        barrier_init(&shared_.k_empty[i], kConsumerWarps);
        barrier_init(&shared_.v_empty[i], kConsumerWarps);
      }
      barrier_publish();
    }
    block_barrier();
    if (thread_index() < C::kConsumers * kGroupThreads) {
      take_registers<C::kConsumerRegisters>();
      consume();
    } else {
      give_registers<C::kProducerRegisters>();
      if (thread_index() < C::kConsumers * kGroupThreads + 32) produce();
    }
  }

 private:
  // -- the producer warp ------------------------------------------------------------------------

  VIDEO_ATTN_DEVICE void produce() {
    const bool leads = thread_index() % 32 == 0;
    if (leads) copy_queries();
    const int kv_tiles = tiles_in(p_.kv_side.length);
    const int64_t first_key_tile =
        (static_cast<int64_t>(batch_) * p_.kv_heads + head_ / (p_.heads / p_.kv_heads)) * kv_tiles;
    WarpWalk walk(p_, batch_, head_, first_tile_ * kTile, last_key());
    for (Place place;; place.advance()) {
      const KeyTile first = walk.next();
      KeyTile second = first.exists() ? walk.next() : first;
      // An odd tile at the end fills the step with itself: its codes are finite, its weights 0.
      if (!second.exists()) second = {first.index, 0};
      const int stage = place.stage;
      barrier_wait(&shared_.k_empty[stage], place.parity ^ 1);
      tell(shared_.steps[stage], first, second, first_key_tile);
      warp_barrier();
      if (!first.exists()) {
        if (leads) barrier_arrive(&shared_.k_full[stage]);
        return;
      }
      const int64_t tiles[kStepTiles] = {first_key_tile + first.index,
                                         first_key_tile + second.index};
      if (leads) {
        barrier_arrive_expecting(&shared_.k_full[stage], C::kKBytes + kShiftBytes);
        copy_step(shared_.k[stage], p_.k_codes, tiles, C::kKBytes, &shared_.k_full[stage]);
        if constexpr (C::kShifted) copy_shift(stage, first.index, second.index);
      }
      barrier_wait(&shared_.v_empty[stage], place.parity ^ 1);
      if (leads) {
        barrier_arrive_expecting(&shared_.v_full[stage], C::kVBytes);
        copy_step(shared_.v[stage], p_.v_codes, tiles, C::kVBytes, &shared_.v_full[stage]);
      }
    }
  }

  // The last key that any valid row of the block may see; -1 for none.
  VIDEO_ATTN_DEVICE int last_key() const {
    int valid = 0;
    for (int c = 0; c < C::kConsumers; ++c) {
      const int tile = first_tile_ + c;
      if (tile < tiles_in(p_.q_side.length)) valid += valid_in_tile(p_.q_side, batch_, tile);
    }
    if (valid == 0) return -1;
    int last = p_.kv_side.length - 1;
    if (p_.is_causal) {
      const int seen = (first_tile_ + C::kConsumers) * kTile - 1 + causal_offset_;
      last = seen < last ? seen : last;
    }
    return last < -1 ? -1 : last;
  }

  VIDEO_ATTN_DEVICE void tell(Step& step, const KeyTile& first, const KeyTile& second,
                              int64_t first_key_tile) const {
    const int lane = thread_index() % 32;
    if (lane < kStepTiles * 4 && first.exists()) {
      const int64_t tile = first_key_tile + (lane < 4 ? first.index : second.index);
      const int group = p_.k_groups == 1 ? 0 : lane % 4;
      step.k_scale[lane / 4][lane % 4] = p_.k_scale[tile * p_.k_groups + group];
    }
    if (lane == 0) {
      step.index[0] = first.index;
      step.index[1] = second.index;
      step.valid[0] = first.valid;
      step.valid[1] = second.valid;
    }
  }

  VIDEO_ATTN_DEVICE static void copy_step(uint8_t* shared, const uint8_t* codes,
                                          const int64_t (&tiles)[kStepTiles], int bytes,
                                          MemoryBarrier* full) {
    const int tile_bytes = bytes / kStepTiles;
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
      copy_bulk(shared + t * tile_bytes, codes + tiles[t] * tile_bytes, tile_bytes, full);
    }
  }

  static constexpr int kShiftBytes = C::kShifted ? kStepTiles * kTile * 4 : 0;

  VIDEO_ATTN_DEVICE void copy_shift(int stage, int first, int second) const {
    const int64_t row = query_tile(0) * tiles_in(p_.kv_side.length);
    for (int t = 0; t < kStepTiles; ++t) {
      copy_bulk(shared_.steps[stage].shift[t],
                p_.score_shift + (row + (t == 0 ? first : second)) * kTile,
                kShiftBytes / kStepTiles, &shared_.k_full[stage]);
    }
  }

  // Row tile of consumer c; one past the end is computed from the last one and not stored.
  VIDEO_ATTN_DEVICE int64_t query_tile(int c) const {
    const int tiles = tiles_in(p_.q_side.length);
    const int tile = first_tile_ + c < tiles ? first_tile_ + c : tiles - 1;
    return (static_cast<int64_t>(batch_) * p_.heads + head_) * tiles + tile;
  }

  VIDEO_ATTN_DEVICE void copy_queries() const {
    constexpr int kBytes = kQkTileBytes<C::kDim>;
    barrier_arrive_expecting(&shared_.q_full, C::kQBytes);
    for (int c = 0; c < C::kConsumers; ++c) {
      copy_bulk(shared_.q + c * kBytes, p_.q_codes + query_tile(c) * kBytes, kBytes,
                &shared_.q_full);
    }
  }

  // -- a consumer warpgroup ---------------------------------------------------------------------

  using Sum = typename Scores<C::kQk>::Sum;
  using Sums = Sum[kStepTiles][kTile / 8][4];
  using Weights = uint32_t[kStepTiles][Values<C::kV>::kSteps][4];
  using Output = float[C::kDim / 8][4];

  // The same in a whole warp, and known to be.
  VIDEO_ATTN_DEVICE int consumer() const {
    return C::kConsumers == 1 ? 0 : shuffle(thread_index() / kGroupThreads, 0);
  }

  VIDEO_ATTN_DEVICE void consume() {
    const int group = q_group(p_.q_groups, row_in_tile(0));
    const float q_factor = p_.q_scale[query_tile(consumer()) * p_.q_groups + group] * p_.scale_log2;
    RowState state;
    Output out = {};
    barrier_wait(&shared_.q_full, 0);
    barrier_wait(&shared_.k_full[0], 0);
    if (shared_.steps[0].index[0] >= 0) {
      if constexpr (C::kOverlaps) {
        attend_overlapped(q_factor, state, out);
      } else {
        attend(q_factor, state, out);
      }
    }
    // The ring is free once every consumer is here; each stores through a part of it.
    using Result = ResultTile<C::kV, C::kDim>;
    static_assert(C::kConsumers * Result::kSharedBytes <= sizeof(Shared::k) + sizeof(Shared::v));
    threads_sync<C::kConsumers * kGroupThreads>(1);
    auto* rows = reinterpret_cast<float*>(shared_.k[0] + consumer() * Result::kSharedBytes);
    Result(p_, batch_, head_, first_tile_ + consumer()).store(out, state, rows, 2 + consumer());
  }

  // One product after the other.
  VIDEO_ATTN_DEVICE void attend(float q_factor, RowState& state, Output& out) {
    Place k, v;
    const int last_key = last_key_of_first_row();
    Weights weights;
    float keep[2];
    do {
      {
        Sums sums;
        wgmma_fence();
        start_scores(sums, k.stage);
        wgmma_wait<0>();
        weigh_step(weights, sums, k, q_factor, last_key, state, keep, [] {});
      }
      rescale(out, keep);
      wgmma_fence();
      start_values(out, weights, v);
      wgmma_wait<0>();
      wgmma_results(out);
      release(&shared_.v_empty[v.stage]);
      v.advance();
    } while (shared_.steps[k.stage].index[0] >= 0);
  }

  // Scores of the next step and values of the last one are multiplied during a step's softmax.
  VIDEO_ATTN_DEVICE void attend_overlapped(float q_factor, RowState& state, Output& out) {
    Place k, v;  // of the next scores, and of the next values
    const int last_key = last_key_of_first_row();
    Weights weights;
    Output fresh;  // of kFreshSums
    float keep[2];
    {
      Sums sums;
      wgmma_fence();
      start_scores(sums, k.stage);
      wgmma_wait<0>();
      weigh_step(weights, sums, k, q_factor, last_key, state, keep, [] {});
    }
    while (shared_.steps[k.stage].index[0] >= 0) {
      Sums sums;
      float keep_next[2];
      wgmma_fence();
      start_scores(sums, k.stage);
      start_values(C::kFreshSums ? fresh : out, weights, v);
      wgmma_wait<1>();
      weigh_step(weights, sums, k, q_factor, last_key, state, keep_next,
                 [&] { finish_values(out, fresh, C::kFreshSums ? keep : keep_next, v); });
      keep[0] = keep_next[0];
      keep[1] = keep_next[1];
    }
    wgmma_fence();
    start_values(C::kFreshSums ? fresh : out, weights, v);
    float none[2] = {1.0f, 1.0f};
    finish_values(out, fresh, C::kFreshSums ? keep : none, v);
  }

  // Scores of the step at `stage`: 64 rows of this consumer by 128 keys.
  VIDEO_ATTN_DEVICE void start_scores(Sums& sums, int stage) {
    // Descriptors that stayed in registers would push something else out.
    const uint32_t q =
        computed_afresh(shared_address(shared_.q + consumer() * kQkTileBytes<C::kDim>));
    const uint32_t k = shared_address(shared_.k[stage]);
#pragma unroll
    for (int step = 0; step < C::kDim / 32; ++step) {
      wgmma_scores(sums, token_matrix<C::kDim>(q, step), token_matrix<C::kDim>(k, step), step > 0);
    }
    wgmma_commit();
  }

  // From finished scores to weights. `finish_last` ends the products that still read `weights`;
  // k goes on to the next step, which is there afterwards.
  template <class Finish>
  VIDEO_ATTN_DEVICE void weigh_step(Weights& weights, Sums& sums, Place& k, float q_factor,
                                    int last_key, RowState& state, float (&keep)[2],
                                    Finish finish_last) {
    float s[kStepTiles][kTile / 8][4];
    ScoreScale scale[kStepTiles];
    const auto& step = shared_.steps[k.stage];
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
      wgmma_results(sums[t]);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][n][i] = static_cast<float>(sums[t][n][i]);
      }
      scale[t] = {0.0f, q_factor * step.k_scale[t][thread_index() % 4]};
      const float* shift = nullptr;
      if constexpr (C::kShifted) shift = step.shift[t];
      adjust_scores<C::kShifted>(s[t], scale[t], last_key, step.index[t], step.valid[t], shift);
    }
    release(&shared_.k_empty[k.stage]);
    weigh<Values<C::kV>::kExponent>(s, scale, state, keep);
    k.advance();
    barrier_wait(&shared_.k_full[k.stage], k.parity);
    finish_last();
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) Values<C::kV>::pack(weights[t], s[t]);
  }

  // The last key that the first row of this consumer sees; row r sees r more.
  VIDEO_ATTN_DEVICE int last_key_of_first_row() const {
    return p_.is_causal ? (first_tile_ + consumer()) * kTile + causal_offset_ : kAllKeys;
  }

  // P V of the step at v.
  VIDEO_ATTN_DEVICE void start_values(Output& out, const Weights& weights, const Place& v) {
    barrier_wait(&shared_.v_full[v.stage], v.parity);
#pragma unroll
    for (int t = 0; t < kStepTiles; ++t) {
      const uint32_t tile = shared_address(shared_.v[v.stage] + t * kVTileBytes<C::kV, C::kDim>);
#pragma unroll
      for (int step = 0; step < Values<C::kV>::kSteps; ++step) {
        if constexpr (C::kV == VCode::kFp8) {
          wgmma_values_fp8(out, weights[t][step], value_matrix_fp8(tile, step), t + step > 0);
        } else {
          wgmma_values_fp16(out, weights[t][step], value_matrix_fp16(tile, step), true);
        }
      }
    }
    wgmma_commit();
  }

  // Fresh sums join the output, rescaled by the `keep` of their own step; an output that was summed
  // in place is rescaled by the `keep` of the step after.
  VIDEO_ATTN_DEVICE void finish_values(Output& out, Output& fresh, const float (&keep)[2],
                                       Place& v) {
    wgmma_wait<0>();
    wgmma_results(C::kFreshSums ? fresh : out);
    release(&shared_.v_empty[v.stage]);
    v.advance();
    if constexpr (C::kFreshSums) {
      join(out, fresh, keep);
    } else {
      rescale(out, keep);
    }
  }

  VIDEO_ATTN_DEVICE static void join(Output& out, const Output& fresh, const float (&keep)[2]) {
#pragma unroll
    for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        out[n][i] = fused_multiply_add(out[n][i], keep[i / 2], fresh[n][i]);
      }
    }
  }

  VIDEO_ATTN_DEVICE static void rescale(Output& out, const float (&keep)[2]) {
#pragma unroll
    for (int n = 0; n < C::kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= keep[i / 2];
    }
  }

  // This warp reads its part of the stage no more.
  VIDEO_ATTN_DEVICE void release(MemoryBarrier* empty) const {
    warp_barrier();
    if (thread_index() % 32 == 0) barrier_arrive(empty);
  }

  const AttentionParams& p_;
  const int batch_, head_, first_tile_, causal_offset_;
  Shared& shared_;
};

}  // namespace video_attn::sage
