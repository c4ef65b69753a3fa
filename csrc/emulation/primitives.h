// The primitives of csrc/device on the CPU; see block.h and machine.h.
#pragma once

#include <cstring>

#include "device/language.h"
#include "emulation/machine.h"

namespace video_attn {

using emulation::barrier_arrive;
using emulation::barrier_arrive_expecting;
using emulation::barrier_init;
using emulation::barrier_wait;
using emulation::Block;
using emulation::MemoryBarrier;
using emulation::wgmma_commit;
using emulation::wgmma_wait;

inline uint8_t* shared_memory() { return Block::current().shared(); }
inline uint32_t shared_address(const void* pointer) {
  return Block::current().shared_offset(pointer);
}
inline void shared_write_fence() {}

template <int kThreads>
void threads_sync(int32_t barrier) {
  Block::current().barrier(barrier, kThreads);
}
template <int kThreads>
void threads_arrive(int32_t barrier) {
  Block::current().arrive(barrier, kThreads);
}

// Blocks run one after another here: each is a cluster of its own.
constexpr int32_t kClusterBlocks = 1;
inline void cluster_sync() { Block::current().barrier(); }

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline void barrier_publish() {}
inline void barrier_wait_together(MemoryBarrier* barrier, uint32_t parity) {
  barrier_wait(barrier, static_cast<int>(parity));
  emulation::warp_barrier();
}

inline void copy_bulk(void* shared, const void* global, int32_t bytes, MemoryBarrier* barrier) {
  Block& block = Block::current();
  auto* destination = static_cast<uint8_t*>(shared);
  block.check_shared(destination, 16);
  block.check_shared(destination + bytes - 16, 16);
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    block.fail("a misaligned bulk copy");
  }
  std::memset(shared, 0xFF, bytes);  // nobody may read it before it is there
  emulation::issue_copy(barrier, bytes, [=] { std::memcpy(shared, global, bytes); });
}

inline void wgmma_fence() {}

}  // namespace video_attn
