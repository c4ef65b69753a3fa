// Device side of the tensor memory accelerator (TMA) and of barriers: one PTX instruction each.
// Shared addresses are 32-bit (`shared_address`).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace video_attn::hopper {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers: a phase ends when `arrivals` threads arrived and all expected bytes are there.
__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the TMA; a __syncthreads() follows.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and says how many bytes the phase still waits for.
__device__ inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni ready;\n"
      "bra.uni again;\n"
      "ready:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same for a whole warp, which is together afterwards. Then one lane may start what lets the
// barrier's next phases pass: no other lane is still about to ask for this one.
__device__ inline void barrier_wait_together(uint32_t barrier, uint32_t parity) {
  barrier_wait(barrier, parity);
  __syncwarp();
}

// Named barriers of a block of threads, each of `kThreads` of them; 0 is that of __syncthreads().
template <int kThreads>
__device__ inline void threads_sync(int32_t barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Arrives without waiting.
template <int kThreads>
__device__ inline void threads_arrive(int32_t barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies one box into shared memory; its bytes count on `barrier`.
__device__ inline void load_box(const CUtensorMap* map, uint32_t destination, uint32_t barrier,
                                int32_t channel, int32_t token, int32_t head, int32_t batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(channel), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// Writes one box from shared memory, in the bulk group that is open in this thread.
__device__ inline void store_box(const CUtensorMap* map, uint32_t source, int32_t channel,
                                 int32_t token, int32_t head, int32_t batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(source), "r"(channel), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `kPending` groups of this thread still read their shared memory.
template <int kPending>
__device__ inline void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Makes ordinary writes to shared memory visible to the TMA and the tensor cores; every writing
// thread calls it before the barrier that the reader waits for.
__device__ inline void shared_write_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace video_attn::hopper
