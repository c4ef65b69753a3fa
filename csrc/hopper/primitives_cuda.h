// The primitives of csrc/hopper as PTX.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "device/primitives.h"

namespace video_attn::hopper {

// -- the tensor memory accelerator ----------------------------------------------------------------

VIDEO_ATTN_DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies one box into shared memory; its bytes count on `barrier`.
VIDEO_ATTN_DEVICE void load_box(const CUtensorMap* map, void* destination, MemoryBarrier* barrier,
                                int32_t channel, int32_t token, int32_t head, int32_t batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// Writes one box from shared memory, in the bulk group that is open in this thread.
VIDEO_ATTN_DEVICE void store_box(const CUtensorMap* map, const void* source, int32_t channel,
                                 int32_t token, int32_t head, int32_t batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(shared_address(source)), "r"(channel), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// Adds contiguous floats in shared memory to memory, in the bulk group that is open in this thread.
VIDEO_ATTN_DEVICE void add_bulk(float* destination, const void* source, int32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   destination),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
}

VIDEO_ATTN_DEVICE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `kPending` groups of this thread still read their shared memory.
template <int kPending>
VIDEO_ATTN_DEVICE void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// -- products -------------------------------------------------------------------------------------

// Nothing that reads these registers moves above this line.
template <class Registers>
VIDEO_ATTN_DEVICE void settle(Registers& tile) {
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
template <class Registers>
VIDEO_ATTN_DEVICE void hold_operand(Registers& tile, uint32_t zero) {
#pragma unroll
  for (int j = 0; j < Registers::width; ++j) {
    asm volatile("xor.b32 %0, %0, %1;"
                 : "+r"(reinterpret_cast<uint32_t&>(tile.tiles[0][j].data[0]))
                 : "r"(zero)
                 : "memory");
  }
}

// 2^x; 0 for minus infinity.
VIDEO_ATTN_DEVICE float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// -- launches -------------------------------------------------------------------------------------

template <class... Parameters, class... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), uint32_t blocks, int threads,
                          int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace video_attn::hopper
