// What a warpgroup does with its tiles: rounding, zeroing, storing.
#pragma once

#include <cstdint>
#include <type_traits>

#include "hopper/backward_primitives.h"

namespace video_attn::hopper {

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

template <typename Registers>
__device__ inline void set_zero(Registers& tile) {
#pragma unroll
  for (int j = 0; j < Registers::width; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      auto& pair = tile.tiles[0][j].data[k];
      pair = std::remove_reference_t<decltype(pair)>{};
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

// Rows of a panel from `valid` on become zero. They may hold anything, NaN too, and products sum
// over them. A fence and a barrier follow.
template <typename Value>
__device__ inline void zero_rows(Value* panel, int valid) {
  constexpr int kChunks = 128 / 16;  // of 16 bytes, in a row
  uint4* chunks = reinterpret_cast<uint4*>(panel);
#pragma unroll 1
  for (int i = valid * kChunks + threadIdx.x % 128; i < 64 * kChunks; i += 128) {
    chunks[i] = uint4{0, 0, 0, 0};
  }
}

// The same for both tiles of a step, with the fence and a barrier of the warpgroup.
template <typename Tile>
__device__ inline void zero_tail(Tile& first, Tile& second, int valid, int barrier_id) {
#pragma unroll 1
  for (int panel = 0; panel < Tile::cols / 64; ++panel) {
    zero_rows(first.data + panel * Tile::rows * 64, valid);
    zero_rows(second.data + panel * Tile::rows * 64, valid);
  }
  shared_write_fence();
  threads_sync<128>(barrier_id);
}

// Writes a gradient to memory by way of `tile`: scaled, rows from `valid` on zero.
template <typename Tile, int kColumns>
__device__ inline void store_gradient(kittens::rt<float, 16, kColumns>& gradient, float scale,
                                      int valid, Tile& tile, const CUtensorMap* map, int channel,
                                      int token, int head, int batch, int barrier_id) {
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2& pair = gradient.tiles[0][j].data[k];
      const bool counts = row_of(k) < valid;
      pair = {counts ? pair.x * scale : 0.f, counts ? pair.y * scale : 0.f};
    }
  }
  store_tile(tile, gradient);
  shared_write_fence();
  threads_sync<128>(barrier_id);
  if (threadIdx.x % 128 == 0) {
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; ++panel) {
      store_box(map, tile.data + panel * Tile::rows * 64, channel + 64 * panel, token, head, batch);
    }
    store_commit();
  }
}

}  // namespace video_attn::hopper
