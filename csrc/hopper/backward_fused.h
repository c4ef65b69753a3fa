// The fused walk: dk and dv of 128 keys as in the key walk, and their part of dq besides, which is
// added to fp32 sums in memory. A last kernel turns the sums into dq.
//
// dq_sums[batch][head][unit][2][16][128][2]: for the 64 queries of a unit, each half of the
// channels as the 128 threads of a warpgroup hold it, so that registers and memory need no
// reordering.
#pragma once

#include "hopper/backward_kernel.h"

namespace video_attn::hopper {

constexpr int kSumsOfUnit = kUnit * 128;

using QuerySums = kittens::rt<float, 16, 64>;

// Four floats per thread and store: neighbouring threads write neighbouring memory.
__device__ inline float4* sums_of_thread(float* sums, int j, int k) {
  return reinterpret_cast<float4*>(sums) + (2 * j + k / 2) * 128 + threadIdx.x % 128;
}

__device__ inline void write_sums(float* sums, const QuerySums& dq) {
#pragma unroll
  for (int j = 0; j < QuerySums::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const float2 a = dq.tiles[0][j].data[k], b = dq.tiles[0][j].data[k + 1];
      *sums_of_thread(sums, j, k) = float4{a.x, a.y, b.x, b.y};
    }
  }
}

__device__ inline void read_sums(float* sums, QuerySums& dq) {
#pragma unroll
  for (int j = 0; j < QuerySums::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const float4 both = *sums_of_thread(sums, j, k);
      dq.tiles[0][j].data[k] = {both.x, both.y};
      dq.tiles[0][j].data[k + 1] = {both.z, both.w};
    }
  }
}

// Keys that are not valid: their scores are those of zeroed keys, and could overflow.
__device__ inline void mask_rows(ScoreTile& probabilities, int valid) {
#pragma unroll
  for (int j = 0; j < kUnit / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (row_of(k) >= valid) probabilities.tiles[0][j].data[k] = {0.f, 0.f};
    }
  }
}

// Keys and values of a warpgroup that do not count become zero: the product for dq sums over keys.
template <typename Config>
__device__ inline void zero_kept_tail(typename Config::Shared& shared, int group, int valid,
                                      int barrier_id) {
  for (int panel = 0; panel < Config::kPanels; ++panel) {
    zero_rows(shared.keys[panel][group].data, valid);
    zero_rows(shared.values[group].data + panel * kUnit * 64, valid);
  }
  shared_write_fence();
  threads_sync<128>(barrier_id);
}

// Adds what a warpgroup has of dq to the sums in memory, by way of shared memory. The sums of the
// step before must have left it.
template <typename Config>
__device__ inline void add_sums(typename Config::Shared& shared, int group, const QuerySums& dq,
                                float* destination, int barrier_id) {
  write_sums(shared.sums[group], dq);
  shared_write_fence();
  threads_sync<128>(barrier_id);
  if (threadIdx.x % 128 == 0) {
    add_bulk(destination, shared.sums[group], sizeof(shared.sums[group]));
    store_commit();
  }
}

template <typename Config>
__device__ inline void walk_fused(const BackwardGlobals& globals, typename Config::Shared& shared,
                                  int group) {
  using Value = typename Config::Value;
  using Panel = typename Config::Panel;
  using KeyPanel = typename Config::KeyPanel;
  constexpr int kConsumers = 128 * Config::kWarpgroups;
  const int barrier_id = kGroupBarrier + group, common_barrier_id = kAllGroupsBarrier;
  const Place place = place_of(globals);
  const int token = kept_token<Config>(globals, place, group);
  const int valid_keys =
      token < globals.kept.length ? max(valid_kept(globals, place.batch, token), 0) : 0;
  const int64_t units = units_of(globals.streamed.length);
  float* sums = globals.dq_sums + place.batch * globals.heads * units * kSumsOfUnit +
                group * Config::kSumsOfGroup;
  auto& values = shared.values[group];
  RingReader<Config> reader{shared, 0};

  kittens::rt<float, 16, Config::kHeadDim> dk, dv;
  kittens::rt<Value, 16, kUnit> packed_p, packed_ds;
  set_zero(dk);
  set_zero(dv);
  set_zero(packed_p);
  set_zero(packed_ds);
  barrier_wait(&shared.kept_full, 0);
  if (valid_keys < kUnit) zero_kept_tail<Config>(shared, group, valid_keys, barrier_id);
  int parity = 0;
  bool began = false;
  while (true) {
    const TileStep step = reader.wait_first();
    if (step.valid < 0) break;
    auto& queries = reader.first_tile();
    auto& grad_out = reader.second_tile();
    const float* statistics = reader.statistics();
    if (step.valid < kUnit) {
      reader.wait_second();
      zero_tail(queries, grad_out, step.valid, barrier_id);
    }
    const auto* query_panels = reinterpret_cast<const Panel*>(queries.data);

    ScoreTile p, ds;
    wgmma_fence();
    product_transposed<false>(p, shared.keys[0][group], query_panels[0]);
    product_transposed<true>(p, shared.keys[1][group], query_panels[1]);
    reader.wait_second();
    wgmma_fence();
    product_transposed<false>(ds, values, grad_out);
    wgmma_wait<1>();
    settle(p);
    settle(packed_ds);
    if (began) reader.release_first(reader.first.previous());
    began = true;

    probabilities<Config>(p, globals.scale_log2, statistics, {});
    if (valid_keys < kUnit) mask_rows(p, valid_keys);
    round_to(packed_p, p);
    settle(packed_p);
    wgmma_fence();
    product(dv, packed_p, grad_out);
    wgmma_wait<1>();
    settle(ds);

    auto& score_gradient_tiles = shared.score_gradients[parity];
    score_gradients<Config>(ds, packed_p, statistics, {});
    round_to(packed_ds, ds);
    settle(packed_ds);
    store_tile(score_gradient_tiles[group], packed_ds);
    shared_write_fence();
    if (threadIdx.x % 128 == 0) store_wait_read<0>();  // for add_sums
    threads_sync<kConsumers>(common_barrier_id);

    QuerySums dq;
    wgmma_fence();
    product_across(dq, reinterpret_cast<const KeyPanel&>(score_gradient_tiles),
                   reinterpret_cast<const KeyPanel&>(shared.keys[group]));
    product(dk, packed_ds, queries);
    wgmma_wait<1>();
    settle(dq);
    settle(packed_p);
    reader.release_second(reader.second.stage);
    add_sums<Config>(shared, group, dq, sums + static_cast<int64_t>(step.unit) * kSumsOfUnit,
                     barrier_id);
    parity ^= 1;
    reader.advance();
  }
  wgmma_wait<0>();
  settle(dk);
  settle(dv);
  // The other warpgroup may still have been reading the gradients of the scores.
  threads_sync<kConsumers>(common_barrier_id);
  store_key_gradients<Config>(
      globals, place, token, barrier_id, dk, dv,
      reinterpret_cast<typename Config::Tile&>(shared.score_gradients[group]), values);
  if (threadIdx.x % 128 == 0) store_wait_read<0>();
}

template <typename Config>
__device__ inline void run_fused(const BackwardGlobals& globals, typename Config::Shared& shared) {
  start_backward<Config>(shared);
  const int group = warp_uniform(threadIdx.x / 128);
  if (group == Config::kWarpgroups) {
    give_registers<Config::kProducerRegisters>();
    produce<Config>(globals, shared);
  } else {
    take_registers<Config::kConsumerRegisters>();
    walk_fused<Config>(globals, shared, group);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    fused_backward_kernel(const __grid_constant__ BackwardGlobals globals) {
  run_fused<Config>(globals, *reinterpret_cast<typename Config::Shared*>(shared_memory()));
}

struct FinishGlobals {
  CUtensorMap dq;
  float* sums;
  Side q_side;
  int32_t heads, units;
  float scale;
};

constexpr int kFinishSharedBytes = kUnit * 64 * 2;

// One block of 128 threads per unit and half of the channels.
template <typename Value>
__device__ inline void run_finish(const FinishGlobals& globals,
                                  kittens::st<Value, kUnit, 64>& tile) {
  const int half = blockIdx.x % 2;
  const int64_t row = blockIdx.x / 2;  // of units, through heads and batches
  const int unit = row % globals.units;
  const int head = row / globals.units % globals.heads;
  const int batch = row / globals.units / globals.heads;
  QuerySums dq;
  read_sums(globals.sums + row * kSumsOfUnit + half * (kSumsOfUnit / 2), dq);
  const int token = unit * kUnit;
  const int block = token / globals.q_side.block_size;
  const int valid =
      valid_tokens(globals.q_side, batch, block) - (token - block * globals.q_side.block_size);
  store_gradient(dq, globals.scale, valid, tile, &globals.dq, 64 * half, token, head, batch,
                 kGroupBarrier);
  if (threadIdx.x == 0) store_wait_read<0>();
}

template <typename Value>
__global__ void __launch_bounds__(128)
    finish_queries(const __grid_constant__ FinishGlobals globals) {
  run_finish<Value>(globals, *reinterpret_cast<kittens::st<Value, kUnit, 64>*>(shared_memory()));
}

}  // namespace video_attn::hopper
