// What the backward kernels ask of a warpgroup and of its tensor cores: ThunderKittens' products
// and the PTX around them.
#pragma once

#include <bit>
#include <cstdint>

#include "hopper/exponential.h"
#include "kittens.cuh"

namespace video_attn::hopper {

using WarpGroup = kittens::warpgroup;

// The same value, known to be one for the whole warp: addresses made from it, and branches on it,
// then cost no vector registers.
__device__ inline int warp_uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Makes earlier register writes visible to the products that follow.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

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

// Holds a left operand that stays in registers through a loop of products. ptxas of CUDA 12.4 to
// 13.0 gives its registers to another left operand of the loop whose products have the same shape,
// and the next step multiplies the wrong numbers. It does not where every step writes the operand:
// so one register of each four is written, with what it holds. `zero` is 0, unknown to the
// compiler. tests/hopper/test_wgmma_operands.py reads the outcome from the machine code.
template <typename Registers>
__device__ inline void hold_operand(Registers& tile, uint32_t zero) {
#pragma unroll
  for (int j = 0; j < Registers::width; ++j) {
    asm volatile("xor.b32 %0, %0, %1;"
                 : "+r"(reinterpret_cast<uint32_t&>(tile.tiles[0][j].data[0]))
                 : "r"(zero)
                 : "memory");
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

// Copies `bytes` (a multiple of 16) of contiguous memory; they count on `barrier`.
__device__ inline void load_bulk(uint32_t destination, const void* source, uint32_t bytes,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// A bf16 is the upper half of a float; as one word, the pair is never taken apart.
__device__ inline float2 unpack(kittens::bf16_2 pair) {
  const uint32_t bits = reinterpret_cast<const uint32_t&>(pair);
  return {std::bit_cast<float>(bits << 16), std::bit_cast<float>(bits & 0xffff0000u)};
}
__device__ inline float2 unpack(float2 pair) { return pair; }
__device__ inline float2 unpack(kittens::half_2 pair) { return __half22float2(pair); }

// Adds contiguous floats in shared memory to memory, in the bulk group that is open in this thread.
__device__ inline void add_bulk(float* destination, uint32_t source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   destination),
               "r"(source), "r"(bytes)
               : "memory");
}

// Between a warpgroup's shared tile and its registers.
template <typename Registers, typename Tile>
__device__ inline void load_tile(Registers& registers, const Tile& tile) {
  WarpGroup::load(registers, tile);
}
template <typename Registers, typename Tile>
__device__ inline void store_tile(Tile& tile, const Registers& registers) {
  WarpGroup::store(tile, registers);
}

template <int kRegisters>
__device__ inline void take_registers() {
  WarpGroup::increase_registers<kRegisters>();
}
template <int kRegisters>
__device__ inline void give_registers() {
  WarpGroup::decrease_registers<kRegisters>();
}

}  // namespace video_attn::hopper
