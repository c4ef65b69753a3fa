// What a warpgroup does with its tiles: order of asynchronous products, packing, zeroing, storing.
#pragma once

#include <cstdint>

#include "hopper/tma.h"
#include "kittens.cuh"

namespace video_attn::hopper {

using WarpGroup = kittens::warpgroup;

// Makes earlier register writes visible to the products that follow.
__device__ inline void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` groups of products run.
template <int kPending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Nothing that reads these registers moves above this line.
template <typename Registers>
__device__ inline void settle(Registers& tile) {
#pragma unroll
  for (int j = 0; j < Registers::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      auto& pair = tile.tiles[0][j].data[k];
      if constexpr (sizeof(pair) == 8) {
        asm volatile("" : "+f"(pair.x), "+f"(pair.y)::"memory");
      } else {
        asm volatile("" : "+r"(reinterpret_cast<uint32_t&>(pair))::"memory");
      }
    }
  }
}

template <typename Shared, typename Left, typename Result>
__device__ inline void product(Result& result, const Left& left, const Shared& right) {
  WarpGroup::mma_AB<Result, Left, Shared, 0, 1>(result, left, right);
}

template <bool kAccumulate, typename Shared, typename Left, typename Result>
__device__ inline void product_transposed(Result& result, const Left& left, const Shared& right) {
  WarpGroup::mma_ABt<Result, Left, Shared, 0, kAccumulate>(result, left, right);
}

// 2^x; 0 for minus infinity.
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline kittens::bf16_2 pack(float2 pair, kittens::bf16) {
  return __float22bfloat162_rn(pair);
}
__device__ inline kittens::half_2 pack(float2 pair, kittens::half) {
  return __float22half2_rn(pair);
}

template <typename Value, int kColumns>
__device__ inline void round_to(kittens::rt<Value, 16, kColumns>& rounded,
                                const kittens::rt<float, 16, kColumns>& exact) {
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      rounded.tiles[0][j].data[k] = pack(exact.tiles[0][j].data[k], Value{});
    }
  }
}

// The columns of `tile.tiles[0][j].data[k]` begin at this one; the second element is the next.
__device__ inline int column_of(int j, int k) {
  return 16 * j + 8 * (k / 2) + 2 * (threadIdx.x % 4);
}

// The row, of the 64 of a warpgroup, of `tile.tiles[0][j].data[k]`.
__device__ inline int row_of(int k) {
  return 16 * (threadIdx.x % 128 / 32) + threadIdx.x % 32 / 4 + 8 * (k % 2);
}

// Rows from `valid` on become zero. They may hold anything, NaN too, and the products sum over
// them. Ends with a barrier of the warpgroup.
template <typename Tile>
__device__ inline void zero_tail(Tile& first, Tile& second, int valid, int barrier_id) {
  constexpr int kChunks = 128 / 16;  // 16 bytes each, of one row of one panel
  constexpr int kPanels = Tile::cols / 64;
  for (int i = threadIdx.x % 128; i < (Tile::rows - valid) * kChunks * kPanels; i += 128) {
    const int row = valid + i / kChunks % (Tile::rows - valid);
    const int panel = i / kChunks / (Tile::rows - valid);
    const int chunk = (panel * Tile::rows + row) * kChunks + i % kChunks;
    reinterpret_cast<uint4*>(first.data)[chunk] = uint4{0, 0, 0, 0};
    reinterpret_cast<uint4*>(second.data)[chunk] = uint4{0, 0, 0, 0};
  }
  shared_write_fence();
  WarpGroup::sync(barrier_id);
}

// Writes a gradient to memory by way of `tile`: scaled, rows from `valid` on zero.
template <typename Tile, int kColumns>
__device__ inline void store_gradient(kittens::rt<float, 16, kColumns>& gradient, float scale,
                                      int valid, Tile& tile, const CUtensorMap* map, int token,
                                      int head, int batch, int barrier_id) {
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& pair = gradient.tiles[0][j].data[k];
      const bool counts = row_of(k) < valid;
      pair = {counts ? pair.x * scale : 0.f, counts ? pair.y * scale : 0.f};
    }
  }
  WarpGroup::store(tile, gradient);
  shared_write_fence();
  WarpGroup::sync(barrier_id);
  if (threadIdx.x % 128 == 0) {
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; ++panel) {
      const uint32_t source = shared_address(tile.data) + panel * Tile::rows * 128;
      store_box(map, source, 64 * panel, token, head, batch);
    }
    store_commit();
  }
}

}  // namespace video_attn::hopper
