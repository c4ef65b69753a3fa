// The two walks of the backward: see backward_config.h.
#pragma once

#include "hopper/backward_config.h"
#include "hopper/backward_producer.h"
#include "hopper/backward_tiles.h"

namespace video_attn::hopper {

// The reading end of a ring. A stage is handed back when the products that read it are known to be
// done; for first operands that is in the step after.
template <typename Config>
struct RingReader {
  typename Config::Shared& shared;
  const int ring;
  RingPlace<Config::kFirstStages> first{};
  RingPlace<Config::kSecondStages> second{};

  // Waits for the first operand of the next step.
  __device__ TileStep wait_first() const {
    auto& barriers = shared.rings[ring];
    barrier_wait(&barriers.first_full[first.stage], first.parity);
    const TileStep& step = barriers.steps[first.stage];
    return {warp_uniform(step.valid), warp_uniform(step.unit)};
  }
  // Waits for the second operand, and the statistics.
  __device__ void wait_second() const {
    barrier_wait(&shared.rings[ring].second_full[second.stage], second.parity);
  }
  __device__ auto& first_tile() const { return shared.first_tile(ring, first.stage); }
  __device__ auto& second_tile() const { return shared.second_tile(ring, second.stage); }
  __device__ const float* statistics() const { return shared.statistics[ring][second.stage]; }

  __device__ void release_first(int stage) const { arrive(&shared.rings[ring].first_empty[stage]); }
  __device__ void release_second(int stage) const {
    arrive(&shared.rings[ring].second_empty[stage]);
  }
  __device__ void advance() {
    first.advance();
    second.advance();
  }

 private:
  // One lane for the warp, after what all lanes have read; a wait for products orders no lanes.
  __device__ void arrive(MemoryBarrier* barrier) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
  }
};

using ScoreTile = kittens::rt<float, 16, kUnit>;

// Minus lse (base 2) and minus delta of the two rows of a thread, in the query walk.
struct RowStatistics {
  float lse[2], delta[2];
};

__device__ inline RowStatistics load_row_statistics(const BackwardGlobals& globals,
                                                    const Place& place, int token) {
  RowStatistics rows{};
  if (token >= globals.kept.length) return rows;
  const int64_t row = static_cast<int64_t>(place.batch) * globals.heads + place.head;
  const float* statistics =
      globals.statistics + (row * units_of(globals.kept.length) + token / kUnit) * (2 * kUnit);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.lse[i] = statistics[row_of(i)];
    rows.delta[i] = statistics[kUnit + row_of(i)];
  }
  return rows;
}

// A pair of neighbouring columns of the statistics of a streamed query tile.
__device__ inline float2 column_pair(const float* statistics, int j, int k) {
  return *reinterpret_cast<const float2*>(statistics + column_of(j, k));
}

// scores <- probabilities
template <typename Config>
__device__ inline void probabilities(ScoreTile& scores, float scale_log2, const float* statistics,
                                     const RowStatistics& rows) {
#pragma unroll
  for (int j = 0; j < kUnit / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& pair = scores.tiles[0][j].data[k];
      float2 minus_lse;
      if constexpr (Config::kWalk == Walk::kKeys) {
        minus_lse = column_pair(statistics, j, k);
      } else {
        minus_lse = {rows.lse[k % 2], rows.lse[k % 2]};
      }
      pair.x = exp2_approximate(fmaf(pair.x, scale_log2, minus_lse.x));
      pair.y = exp2_approximate(fmaf(pair.y, scale_log2, minus_lse.y));
    }
  }
}

// grad_probabilities <- gradients of the scores (without the scale)
template <typename Config, typename Probabilities>
__device__ inline void score_gradients(ScoreTile& grad_probabilities,
                                       const Probabilities& probabilities, const float* statistics,
                                       const RowStatistics& rows) {
#pragma unroll
  for (int j = 0; j < kUnit / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& pair = grad_probabilities.tiles[0][j].data[k];
      const float2 p = unpack(probabilities.tiles[0][j].data[k]);
      float2 minus_delta;
      if constexpr (Config::kWalk == Walk::kKeys) {
        minus_delta = column_pair(statistics + kUnit, j, k);
      } else {
        minus_delta = {rows.delta[k % 2], rows.delta[k % 2]};
      }
      pair.x = p.x * (pair.x + minus_delta.x);
      pair.y = p.y * (pair.y + minus_delta.y);
    }
  }
}

// Scores of keys that are not valid: zeroed keys have score 0, whose probability could overflow.
__device__ inline void mask_columns(ScoreTile& scores, int valid) {
#pragma unroll
  for (int j = 0; j < kUnit / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& pair = scores.tiles[0][j].data[k];
      if (column_of(j, k) >= valid) pair.x = -INFINITY;
      if (column_of(j, k) + 1 >= valid) pair.y = -INFINITY;
    }
  }
}

// How many of the 64 kept rows from `token` on count.
__device__ inline int valid_kept(const BackwardGlobals& globals, int batch, int token) {
  const int block = token / globals.kept.block_size;
  return valid_tokens(globals.kept, batch, block) - (token - block * globals.kept.block_size);
}

// The end of a key walk: dk and dv of 64 keys to memory, by way of two tiles that nobody reads any
// more.
template <typename Config, typename Gradient, typename Tile>
__device__ inline void store_key_gradients(const BackwardGlobals& globals, const Place& place,
                                           int token, int barrier_id, Gradient& dk, Gradient& dv,
                                           Tile& dk_tile, Tile& dv_tile) {
  if (token >= globals.kept.length) return;
  const int valid = valid_kept(globals, place.batch, token);
  store_gradient(dv, 1.f, valid, dv_tile, &globals.result_second, 0, token, place.head, place.batch,
                 barrier_id);
  store_gradient(dk, globals.scale, valid, dk_tile, &globals.result_first, 0, token, place.head,
                 place.batch, barrier_id);
  if (threadIdx.x % 128 == 0) store_wait_read<0>();
}

// dk and dv of 64 keys.
template <typename Config>
__device__ inline void walk_keys(const BackwardGlobals& globals, typename Config::Shared& shared,
                                 int group) {
  using Value = typename Config::Value;
  using Gradient = kittens::rt<float, 16, Config::kHeadDim>;
  using Packed = kittens::rt<Value, 16, kUnit>;
  const int barrier_id = kGroupBarrier + group;
  auto& keys = shared.kept_first(group);
  auto& values = shared.kept_second(group);
  RingReader<Config> reader{shared, Config::kSharedList ? 0 : group};

  Gradient dk, dv;
  set_zero(dk);
  set_zero(dv);
  barrier_wait(&shared.kept_full, 0);
  Packed packed_p, packed_ds;  // outside the loop: products read them until the next step
  set_zero(packed_p);
  set_zero(packed_ds);
  bool began = false;
  while (true) {
    const int valid = reader.wait_first().valid;
    if (valid < 0) break;
    auto& queries = reader.first_tile();
    auto& grad_out = reader.second_tile();
    const float* statistics = reader.statistics();
    if (valid < kUnit) {
      reader.wait_second();
      zero_tail(queries, grad_out, valid, barrier_id);
    }

    ScoreTile p, ds;
    wgmma_fence();
    product_transposed<false>(p, keys, queries);
    reader.wait_second();
    wgmma_fence();
    product_transposed<false>(ds, values, grad_out);
    wgmma_wait<1>();
    settle(p);
    settle(packed_ds);
    if (began) reader.release_first(reader.first.previous());
    began = true;

    probabilities<Config>(p, globals.scale_log2, statistics, {});
    round_to(packed_p, p);
    settle(packed_p);
    wgmma_fence();
    product(dv, packed_p, grad_out);
    wgmma_wait<1>();
    settle(ds);

    score_gradients<Config>(ds, packed_p, statistics, {});
    round_to(packed_ds, ds);
    settle(packed_ds);
    wgmma_fence();
    product(dk, packed_ds, queries);
    wgmma_wait<1>();  // dv is done
    settle(packed_p);
    reader.release_second(reader.second.stage);
    reader.advance();
  }
  wgmma_wait<0>();
  settle(dk);
  settle(dv);

  threads_sync<128>(barrier_id);
  const Place place = place_of(globals);
  store_key_gradients<Config>(globals, place, kept_token<Config>(globals, place, group), barrier_id,
                              dk, dv, keys, values);
}

// Moves the kept tiles of a warpgroup to registers, and gives all stages of its ring to the
// producer.
template <typename Config, typename Registers>
__device__ inline void take_kept(typename Config::Shared& shared, const RingReader<Config>& reader,
                                 int group, Registers& first, Registers& second) {
  for (int stage = 0; stage < Config::kOwnFirst; ++stage) reader.release_first(stage);
  for (int stage = 0; stage < Config::kOwnSecond; ++stage) reader.release_second(stage);
  barrier_wait(&shared.kept_full, 0);
  load_tile(first, shared.kept_first(group));
  load_tile(second, shared.kept_second(group));
  __syncwarp();
  for (int stage = Config::kOwnFirst; stage < Config::kFirstStages; ++stage) {
    reader.release_first(stage);
  }
  for (int stage = Config::kOwnSecond; stage < Config::kSecondStages; ++stage) {
    reader.release_second(stage);
  }
}

// dq of 64 queries, which stay in registers with their grad_out.
template <typename Config>
__device__ inline void walk_queries(const BackwardGlobals& globals, typename Config::Shared& shared,
                                    int group) {
  using Value = typename Config::Value;
  using Kept = kittens::rt<Value, 16, Config::kHeadDim>;
  const int barrier_id = kGroupBarrier + group;
  const Place place = place_of(globals);
  const int token = kept_token<Config>(globals, place, group);
  RingReader<Config> reader{shared, Config::kSharedList ? 0 : group};

  const RowStatistics rows = load_row_statistics(globals, place, token);
  kittens::rt<float, 16, Config::kHeadDim> dq;
  kittens::rt<Value, 16, kUnit> packed_ds;  // outside the loop, as in the key walk
  set_zero(dq);
  set_zero(packed_ds);
  Kept q, grad_out;
  take_kept<Config>(shared, reader, group, q, grad_out);
  const uint32_t zero = static_cast<uint32_t>(globals.units) >> 31;  // for hold_operand()
  bool began = false;
  while (true) {
    const int valid = reader.wait_first().valid;
    if (valid < 0) break;
    auto& keys = reader.first_tile();
    auto& values = reader.second_tile();
    if (valid < kUnit) {
      reader.wait_second();
      zero_tail(keys, values, valid, barrier_id);
    }

    ScoreTile p, ds;
    wgmma_fence();
    product_transposed<false>(p, q, keys);
    reader.wait_second();
    wgmma_fence();
    product_transposed<false>(ds, grad_out, values);
    wgmma_wait<1>();
    settle(p);
    settle(packed_ds);
    if (began) reader.release_first(reader.first.previous());
    began = true;

    if (valid < kUnit) mask_columns(p, valid);
    probabilities<Config>(p, globals.scale_log2, nullptr, rows);
    settle(p);  // before the wait, not after it
    wgmma_wait<0>();
    settle(ds);
    if constexpr (Config::kHeadDim == kUnit) {  // their products have the shape of that of dq
      hold_operand(q, zero);
      hold_operand(grad_out, zero);
    }
    reader.release_second(reader.second.stage);
    score_gradients<Config>(ds, p, nullptr, rows);
    round_to(packed_ds, ds);
    settle(packed_ds);
    wgmma_fence();
    product(dq, packed_ds, keys);
    reader.advance();
  }
  wgmma_wait<0>();
  settle(dq);

  // The memory of the kept tiles has been a stage of a ring: all its readers are done.
  threads_sync<128 * Config::kRingReaders>(Config::kSharedList ? kAllGroupsBarrier : barrier_id);
  if (token >= globals.kept.length) return;
  const int valid = valid_kept(globals, place.batch, token);
  store_gradient(dq, globals.scale, valid, shared.kept_first(group), &globals.result_first, 0,
                 token, place.head, place.batch, barrier_id);
  if (threadIdx.x % 128 == 0) store_wait_read<0>();
}

// The barriers of a block of threads; ends with a barrier of all of them.
template <typename Config>
__device__ inline void start_backward(typename Config::Shared& shared) {
  if (threadIdx.x == 0) {
    barrier_init(&shared.kept_full, 1);
    for (auto& ring : shared.rings) {
      for (auto& full : ring.first_full) barrier_init(&full, 1);
      for (auto& full : ring.second_full) barrier_init(&full, 1);
      constexpr int kArrivals = 4 * Config::kRingReaders;  // one per warp
      for (auto& empty : ring.first_empty) barrier_init(&empty, kArrivals);
      for (auto& empty : ring.second_empty) barrier_init(&empty, kArrivals);
    }
    barrier_publish();
  }
  __syncthreads();
}

template <typename Config>
__device__ inline void run_backward(const BackwardGlobals& globals,
                                    typename Config::Shared& shared) {
  start_backward<Config>(shared);
  const int group = warp_uniform(threadIdx.x / 128);
  if (group == Config::kWarpgroups) {
    give_registers<Config::kProducerRegisters>();
    produce<Config>(globals, shared);
  } else {
    take_registers<Config::kConsumerRegisters>();
    if constexpr (Config::kWalk == Walk::kKeys) {
      walk_keys<Config>(globals, shared, group);
    } else {
      walk_queries<Config>(globals, shared, group);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardGlobals globals) {
  run_backward<Config>(globals, *reinterpret_cast<typename Config::Shared*>(shared_memory()));
}

}  // namespace video_attn::hopper
