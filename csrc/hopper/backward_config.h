// The backward kernels: tile shapes, shared memory, and what a launch is given.
//
// Two walks share one template. The key walk keeps 64 keys per warpgroup and streams the query
// blocks that see them (dk, dv); the query walk keeps 64 queries and streams the key blocks they
// see (dq). "First" names the operands of the scores (q, k), "second" the others (grad_out, v).
// Nothing is added across blocks of threads, so the gradients are bitwise the same in every run.
// The fused walk is a key walk that makes dq as well, five products instead of seven, and adds its
// part to sums in memory, in any order.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/primitives.h"
#include "device/ring.h"
#include "hopper/params.h"
#include "hopper/step_list.h"
#include "kittens.cuh"

namespace video_attn::hopper {

enum class Walk { kKeys, kQueries };

enum BackwardBarrier : int32_t {
  kGroupBarrier = 1,  // + warpgroup
  kAllGroupsBarrier = 3
};

// One streamed tile.
struct TileStep {
  int32_t valid;  // rows that count; -1 ends the walk
  int32_t unit;   // which tile of its batch, counted through the heads
};

// The barriers of a ring: its first and second operands come and go one by one.
template <int kFirstStages, int kSecondStages>
struct RingBarriers {
  MemoryBarrier first_full[kFirstStages], first_empty[kFirstStages];
  MemoryBarrier second_full[kSecondStages], second_empty[kSecondStages];
  TileStep steps[kFirstStages];  // come with the first operand
};

// kSharedList: both warpgroups of a block of threads lie in one block (its size is a multiple
// of 128) and walk its list together; otherwise each has a list, a ring and a producer of its own.
template <typename ValueT, int kHeadDimT, Walk kWalkT, bool kSharedListT>
struct BackwardConfig {
  using Value = ValueT;
  static constexpr int kHeadDim = kHeadDimT;
  static constexpr Walk kWalk = kWalkT;
  static constexpr bool kSharedList = kSharedListT;
  static_assert(kHeadDim == 64 || kHeadDim == 128, "channels are padded to 64 or 128");

  static constexpr int kWarpgroups = 2;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kConsumerRegisters = 240;
  static constexpr int kProducerRegisters = 24;

  static constexpr int kRings = kSharedList ? 1 : kWarpgroups;
  static constexpr int kRingReaders = kWarpgroups / kRings;

  using Tile = kittens::st<Value, kUnit, kHeadDim>;
  static constexpr int kTileBytes = sizeof(Tile);
  static constexpr int kPanels = kHeadDim / 64;  // a panel is 64 channels: one box of the TMA
  static constexpr int kPanelBytes = kTileBytes / kPanels;

  // In the query walk the kept tiles move to registers and their memory to the rings: the last
  // stages of each, which the producer gets from the warpgroups and not at once.
  static constexpr bool kKeptMoves = kWalk == Walk::kQueries;
  static constexpr int kMovedStages = kKeptMoves ? kRingReaders : 0;
  // First operands are needed longest, so they get more stages where not all fit.
  static constexpr int kOwnFirst = kHeadDim == 64 ? 8 / kRings : kSharedList ? 4 : 3;
  static constexpr int kOwnSecond = kHeadDim == 64 ? 8 / kRings : kSharedList ? 4 : 2;
  static constexpr int kFirstStages = kOwnFirst + kMovedStages;
  static constexpr int kSecondStages = kOwnSecond + kMovedStages;

  // Row statistics of one streamed query tile (see backward_prepare.h) come with its second
  // operand.
  static constexpr bool kHasStatistics = kWalk == Walk::kKeys;
  static constexpr int kStatisticsBytes = kHasStatistics ? 2 * kUnit * sizeof(float) : 0;

  struct Shared {
    Tile first[kRings * kFirstStages + (kKeptMoves ? 0 : kWarpgroups)];
    Tile second[kRings * kSecondStages + (kKeptMoves ? 0 : kWarpgroups)];
    float statistics[kRings][kSecondStages][kHasStatistics ? 2 * kUnit : 1];
    RingBarriers<kFirstStages, kSecondStages> rings[kRings];
    MemoryBarrier kept_full;

    __device__ Tile& first_tile(int ring, int stage) { return first[ring * kFirstStages + stage]; }
    __device__ Tile& second_tile(int ring, int stage) {
      return second[ring * kSecondStages + stage];
    }
    __device__ Tile& kept_first(int group) {
      if constexpr (!kKeptMoves) return first[kRings * kFirstStages + group];
      return first_tile(group / kRingReaders, kOwnFirst + group % kRingReaders);
    }
    __device__ Tile& kept_second(int group) {
      if constexpr (!kKeptMoves) return second[kRings * kSecondStages + group];
      return second_tile(group / kRingReaders, kOwnSecond + group % kRingReaders);
    }
    __device__ void* kept_first_panel(int group, int panel) {
      return kept_first(group).data + panel * kUnit * 64;
    }
    __device__ void* kept_second_panel(int group, int panel) {
      return kept_second(group).data + panel * kUnit * 64;
    }
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of one multiprocessor");
};

// The fused walk: 128 keys of one block per block of threads, 128 channels.
template <typename ValueT>
struct FusedConfig : BackwardConfig<ValueT, 128, Walk::kKeys, true> {
  using Base = BackwardConfig<ValueT, 128, Walk::kKeys, true>;
  using Base::kWarpgroups, Base::kPanels;
  using typename Base::Tile;
  static constexpr int kFirstStages = 3, kSecondStages = 3;

  using Panel = kittens::st<ValueT, kUnit, 64>;
  using KeyPanel = kittens::st<ValueT, kWarpgroups * kUnit, 64>;  // of both warpgroups
  static constexpr int kSumsOfGroup = kUnit * 64;  // of dq: each warpgroup makes 64 channels

  struct Shared {
    Panel keys[kPanels][kWarpgroups];
    Tile values[kWarpgroups];
    Tile first[kFirstStages], second[kSecondStages];
    Panel score_gradients[2][kWarpgroups];  // keys by queries; the two alternate
    alignas(1024) float sums[kWarpgroups][kSumsOfGroup];
    float statistics[1][kSecondStages][2 * kUnit];
    RingBarriers<kFirstStages, kSecondStages> rings[1];
    MemoryBarrier kept_full;

    __device__ Tile& first_tile(int, int stage) { return first[stage]; }
    __device__ Tile& second_tile(int, int stage) { return second[stage]; }
    __device__ void* kept_first_panel(int group, int panel) { return &keys[panel][group]; }
    __device__ void* kept_second_panel(int group, int panel) {
      return values[group].data + panel * kUnit * 64;
    }
  };
  static constexpr int kSharedBytes = sizeof(Shared);
  static_assert(kSharedBytes <= 227 * 1024, "shared memory of one multiprocessor");
};

struct BackwardGlobals {
  CUtensorMap kept_first, kept_second, streamed_first, streamed_second;
  CUtensorMap result_first, result_second;  // dk and dv, or dq alone
  const float* statistics;
  float* dq_sums;    // fused walk: see backward_fused.h
  BlockLists lists;  // one row per block of the kept side
  Side kept, streamed;
  int32_t list_heads;  // query heads that one kept head answers to: the GQA group, or 1
  int32_t group;       // query heads per key head
  int32_t kept_heads, heads;
  int32_t units;         // of the kept side
  int32_t tiles;         // pairs of them: blocks of threads per head
  const int32_t* order;  // see backward_order.h; null: as they stand
  int64_t order_batch_stride, order_head_stride;
  float scale, scale_log2;
};

__host__ __device__ constexpr int32_t units_of(int32_t length) { return divide_up(length, kUnit); }

}  // namespace video_attn::hopper
