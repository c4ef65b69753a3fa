// The producer warps of the backward: they alone know the block lists. A step of a ring is one tile
// of 64 streamed tokens, its first and second operand together.
#pragma once

#include "hopper/backward_config.h"
#include "hopper/backward_primitives.h"

namespace video_attn::hopper {

// Where in the problem a block of threads works.
struct Place {
  int32_t tile, head, batch;  // the head of the kept side
};

__device__ inline Place place_of(const BackwardGlobals& globals) {
  const int32_t rest = blockIdx.x / globals.tiles;
  return {static_cast<int32_t>(blockIdx.x % globals.tiles), rest % globals.kept_heads,
          rest / globals.kept_heads};
}

// The first of the 64 kept tokens of a warpgroup; at or past the end if there are none for it.
template <typename Config>
__device__ inline int32_t kept_token(const BackwardGlobals& globals, const Place& place,
                                     int32_t group) {
  constexpr int32_t kUnitsOfItem = Config::kRingReaders;  // an item: what walks a list together
  const int32_t items = (globals.units + kUnitsOfItem - 1) / kUnitsOfItem;
  int32_t item = place.tile * Config::kRings + group / kUnitsOfItem;
  if (globals.order != nullptr && item < items) {
    item = globals.order[place.batch * globals.order_batch_stride +
                         place.head * globals.order_head_stride + item];
  }
  return (item * kUnitsOfItem + group % kUnitsOfItem) * kUnit;
}

template <typename Config>
__device__ inline void load_kept(const BackwardGlobals& globals, typename Config::Shared& shared,
                                 const Place& place) {
  MemoryBarrier* barrier = &shared.kept_full;
  barrier_arrive_expecting(barrier, Config::kWarpgroups * 2 * Config::kTileBytes);
  for (int group = 0; group < Config::kWarpgroups; ++group) {
    const int token = kept_token<Config>(globals, place, group);
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      load_box(&globals.kept_first, shared.kept_first_panel(group, panel), barrier, 64 * panel,
               token, place.head, place.batch);
      load_box(&globals.kept_second, shared.kept_second_panel(group, panel), barrier, 64 * panel,
               token, place.head, place.batch);
    }
  }
}

// Fills one ring, in the order of the lists. Called by a whole warp.
template <typename Config>
struct RingWriter {
  // In a first round the stages are free, or their readers hand them over.
  static constexpr uint32_t kFirstParity = Config::kKeptMoves ? 0 : 1;

  const BackwardGlobals& globals;
  typename Config::Shared& shared;
  const int ring;
  const int lane;
  RingPlace<Config::kFirstStages> first{0, kFirstParity};
  RingPlace<Config::kSecondStages> second{0, kFirstParity};

  __device__ void load_tile_of(const CUtensorMap* map, typename Config::Tile& tile,
                               MemoryBarrier* full, int32_t token, int32_t head, int32_t batch) {
#pragma unroll
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      load_box(map, reinterpret_cast<uint8_t*>(&tile) + panel * Config::kPanelBytes, full,
               64 * panel, token, head, batch);
    }
  }

  __device__ void push_tile(int32_t token, int32_t valid, int32_t head, int32_t batch) {
    auto& barriers = shared.rings[ring];
    const int32_t source_head = Config::kWalk == Walk::kKeys ? head : head / globals.group;
    const int32_t unit = source_head * units_of(globals.streamed.length) + token / kUnit;

    barrier_wait_together(&barriers.first_empty[first.stage], first.parity);
    if (lane == 0) {
      MemoryBarrier* full = &barriers.first_full[first.stage];
      barriers.steps[first.stage] = {valid, unit};
      barrier_arrive_expecting(full, Config::kTileBytes);
      load_tile_of(&globals.streamed_first, shared.first_tile(ring, first.stage), full, token,
                   source_head, batch);
    }
    __syncwarp();
    first.advance();

    barrier_wait_together(&barriers.second_empty[second.stage], second.parity);
    if (lane == 0) {
      MemoryBarrier* full = &barriers.second_full[second.stage];
      barrier_arrive_expecting(full, Config::kTileBytes + Config::kStatisticsBytes);
      if constexpr (Config::kHasStatistics) {
        const int64_t units =
            static_cast<int64_t>(globals.heads) * units_of(globals.streamed.length);
        copy_bulk(shared.statistics[ring][second.stage],
                  globals.statistics + (batch * units + unit) * (2 * kUnit),
                  Config::kStatisticsBytes, full);
      }
      load_tile_of(&globals.streamed_second, shared.second_tile(ring, second.stage), full, token,
                   source_head, batch);
    }
    __syncwarp();
    second.advance();
  }

  // Every tile of the list of one block of the kept side.
  __device__ void push_list(int32_t block, int32_t head, int32_t batch) {
    const Side& streamed = globals.streamed;
    const RowList list = row_list(globals.lists, streamed, batch, head, block);
#pragma unroll 1
    for (int32_t base = 0; base < list.count; base += 32) {
      int32_t my_block = 0, my_valid = 0;
      if (base + lane < list.count) {
        my_block = list.block(base + lane);
        my_valid = valid_tokens(streamed, batch, my_block);
      }
      const int32_t here = min(32, list.count - base);
#pragma unroll 1
      for (int32_t i = 0; i < here; ++i) {
        const int32_t start = __shfl_sync(~0u, my_block, i) * streamed.block_size;
        const int32_t valid = __shfl_sync(~0u, my_valid, i);
#pragma unroll 1
        for (int32_t done = 0; done < valid; done += kUnit) {
          push_tile(start + done, min(kUnit, valid - done), head, batch);
        }
      }
    }
  }

  __device__ void push_end() {
    auto& barriers = shared.rings[ring];
    barrier_wait_together(&barriers.first_empty[first.stage], first.parity);
    if (lane == 0) {
      barriers.steps[first.stage] = {-1, 0};
      barrier_arrive(&barriers.first_full[first.stage]);
    }
  }
};

template <typename Config>
__device__ inline void produce(const BackwardGlobals& globals, typename Config::Shared& shared) {
  const int warp = warp_uniform(threadIdx.x % 128 / 32);
  if (warp >= Config::kRings) return;
  const Place place = place_of(globals);
  const int lane = threadIdx.x % 32;
  if (warp == 0 && lane == 0) load_kept<Config>(globals, shared, place);

  RingWriter<Config> writer{globals, shared, warp, lane};
  const int32_t token = kept_token<Config>(globals, place, warp);
  if (token < globals.kept.length) {
    const int32_t block = token / globals.kept.block_size;
#pragma unroll 1
    for (int32_t member = 0; member < globals.list_heads; ++member) {
      writer.push_list(block, place.head * globals.list_heads + member, place.batch);
    }
  }
  writer.push_end();
}

}  // namespace video_attn::hopper
