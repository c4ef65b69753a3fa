// The primitives as PTX, one instruction each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/language.h"

namespace video_attn {

// -- shared memory --------------------------------------------------------------------------------

// The dynamic shared memory of the block.
VIDEO_ATTN_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

VIDEO_ATTN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Makes ordinary writes to shared memory visible to copies and the tensor cores; every writing
// thread calls it before the barrier that the reader waits for.
VIDEO_ATTN_DEVICE void shared_write_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- barriers of threads --------------------------------------------------------------------------

// Named barriers of a block, each of `kThreads` threads; 0 is that of __syncthreads().
template <int kThreads>
VIDEO_ATTN_DEVICE void threads_sync(int32_t barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Arrives without waiting.
template <int kThreads>
VIDEO_ATTN_DEVICE void threads_arrive(int32_t barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Blocks of threads in a cluster, and the barrier of all their threads, which also makes earlier
// writes to memory visible to them.
constexpr int32_t kClusterBlocks = 8;
VIDEO_ATTN_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Registers of a thread from here on, by a whole warpgroup: more, or fewer.
template <int kRegisters>
VIDEO_ATTN_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
VIDEO_ATTN_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// -- memory barriers ------------------------------------------------------------------------------

// In shared memory. A phase ends when all have arrived and all expected bytes are there; phases
// have parity 0, 1, 0, ...
using MemoryBarrier = uint64_t;

VIDEO_ATTN_DEVICE void barrier_init(MemoryBarrier* barrier, int32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes new barriers visible to copies; a __syncthreads() follows.
VIDEO_ATTN_DEVICE void barrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

VIDEO_ATTN_DEVICE void barrier_arrive(MemoryBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives and says how many bytes the phase still waits for.
VIDEO_ATTN_DEVICE void barrier_arrive_expecting(MemoryBarrier* barrier, int32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of this parity has ended.
VIDEO_ATTN_DEVICE void barrier_wait(MemoryBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni ready;\n"
      "bra.uni again;\n"
      "ready:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A barrier_wait() of a whole warp, which is together afterwards. Then one lane may start what lets
// the barrier's next phases pass: no other lane is still about to ask for this one.
VIDEO_ATTN_DEVICE void barrier_wait_together(MemoryBarrier* barrier, uint32_t parity) {
  barrier_wait(barrier, parity);
  __syncwarp();
}

// -- bulk copies ----------------------------------------------------------------------------------

// Copies `bytes` (a multiple of 16) that lie side by side, and counts them on `barrier`.
VIDEO_ATTN_DEVICE void copy_bulk(void* shared, const void* global, int32_t bytes,
                                 MemoryBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// -- products of a warpgroup ----------------------------------------------------------------------

// Between writing registers and the products that use them.
VIDEO_ATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
VIDEO_ATTN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kLeft` committed groups run.
template <int kLeft>
VIDEO_ATTN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

}  // namespace video_attn
