// What the kernels of the backward ask of ThunderKittens: products, conversions, moves of tiles.
#pragma once

#include <bit>
#include <cstdint>

#include "hopper/primitives.h"
#include "kittens.cuh"

namespace video_attn::hopper {

using WarpGroup = kittens::warpgroup;

// The same value, known to be one for the whole warp: addresses made from it, and branches on it,
// then cost no vector registers.
__device__ inline int warp_uniform(int x) { return __shfl_sync(~0u, x, 0); }

template <typename Shared, typename Left, typename Result>
__device__ inline void product(Result& result, const Left& left, const Shared& right) {
  WarpGroup::mma_AB<Result, Left, Shared, 0, 1>(result, left, right);
}

template <bool kAccumulate, typename Shared, typename Left, typename Result>
__device__ inline void product_transposed(Result& result, const Left& left, const Shared& right) {
  WarpGroup::mma_ABt<Result, Left, Shared, 0, kAccumulate>(result, left, right);
}

// result <- left^T right
template <typename Shared, typename Left, typename Result>
__device__ inline void product_across(Result& result, const Left& left, const Shared& right) {
  WarpGroup::mma_AtB<Result, Left, Shared, 0, 0>(result, left, right);
}

__device__ inline kittens::bf16_2 pack(float2 pair, kittens::bf16) {
  return __float22bfloat162_rn(pair);
}
__device__ inline kittens::half_2 pack(float2 pair, kittens::half) {
  return __float22half2_rn(pair);
}

// A bf16 is the upper half of a float; as one word, the pair is never taken apart.
__device__ inline float2 unpack(kittens::bf16_2 pair) {
  const uint32_t bits = reinterpret_cast<const uint32_t&>(pair);
  return {std::bit_cast<float>(bits << 16), std::bit_cast<float>(bits & 0xffff0000u)};
}
__device__ inline float2 unpack(float2 pair) { return pair; }
__device__ inline float2 unpack(kittens::half_2 pair) { return __half22float2(pair); }

// Between a warpgroup's shared tile and its registers.
template <typename Registers, typename Tile>
__device__ inline void load_tile(Registers& registers, const Tile& tile) {
  WarpGroup::load(registers, tile);
}
template <typename Registers, typename Tile>
__device__ inline void store_tile(Tile& tile, const Registers& registers) {
  WarpGroup::store(tile, registers);
}

}  // namespace video_attn::hopper
