// What threads of a block do together on hardware, on the CPU: shuffles, votes, memory barriers
// with the copies that they count, groups of products of a warpgroup. See block.h for what is
// varied.
#pragma once

#include <cstdint>
#include <utility>

#include "emulation/block.h"

namespace video_attn::emulation {

// -- warps ----------------------------------------------------------------------------------------

// What lane `lane` gives; `name` tells one kind of shuffle from another.
template <class T>
T shuffle(const char* name, T x, int lane) {
  struct Argument {
    T given, received;
    int lane;
  } mine{x, x, lane};
  Block::current().together(name, mine, [](Argument* const* lanes) {
    for (int i = 0; i < kWarp; ++i) lanes[i]->received = lanes[lanes[i]->lane % kWarp]->given;
  });
  return mine.received;
}

inline int lane_index() { return Block::current().thread() % kWarp; }

inline uint32_t ballot(bool x) {
  struct Argument {
    bool given;
    uint32_t received;
  } mine{x, 0};
  Block::current().together("ballot", mine, [](Argument* const* lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= static_cast<uint32_t>(lanes[i]->given) << i;
    for (int i = 0; i < kWarp; ++i) lanes[i]->received = bits;
  });
  return mine.received;
}

inline void warp_barrier() {
  int nothing = 0;
  Block::current().together("warp_barrier", nothing, [](int* const*) {});
}

// -- memory barriers ------------------------------------------------------------------------------

using MemoryBarrier = uint64_t;

inline BarrierState& barrier_state(const MemoryBarrier* barrier) {
  Block::current().check_shared(barrier, sizeof(*barrier));
  const auto found = Block::current().hopper.barriers.find(barrier);
  if (found == Block::current().hopper.barriers.end()) {
    Block::current().fail("a memory barrier that nobody made");
  }
  return found->second;
}

inline void end_phase_if_complete(BarrierState& state) {
  if (state.missing > 0 || state.bytes > 0) return;
  state.missing = state.arrivals;
  state.parity ^= 1;
  Block::current().wake(state.waiting);
}

// Without ending the phase: that is up to the caller.
inline void do_copies(BarrierState& state) {
  for (const Task& copy : state.copies) copy();
  state.copies.clear();
}

inline void barrier_init(MemoryBarrier* barrier, int arrivals) {
  Block::current().check_shared(barrier, sizeof(*barrier));
  Block::current().hopper.barriers[barrier] = {.arrivals = arrivals, .missing = arrivals};
}

inline void barrier_arrive_expecting(MemoryBarrier* barrier, int bytes) {
  BarrierState& state = barrier_state(barrier);
  if (state.missing == 0) Block::current().fail("one arrival too many at a memory barrier");
  state.bytes += bytes;
  --state.missing;
  if (!state.waiting.empty()) do_copies(state);
  end_phase_if_complete(state);
}

inline void barrier_arrive(MemoryBarrier* barrier) { barrier_arrive_expecting(barrier, 0); }

inline void barrier_wait(MemoryBarrier* barrier, int parity) {
  BarrierState& state = barrier_state(barrier);
  if (state.parity != parity) return;
  do_copies(state);
  end_phase_if_complete(state);
  while (state.parity == parity) {
    state.waiting.push_back(Block::current().thread());
    Block::current().park("a memory barrier");
  }
}

// A copy whose `bytes` count on `barrier`.
inline void issue_copy(MemoryBarrier* barrier, int bytes, Task copy) {
  BarrierState& state = barrier_state(barrier);
  state.copies.push_back([&state, bytes, copy = std::move(copy)] {
    copy();
    state.bytes -= bytes;
  });
  if (!options.late_copies || !state.waiting.empty()) {
    do_copies(state);
    end_phase_if_complete(state);
  }
}

// -- products of a warpgroup ----------------------------------------------------------------------

inline WarpgroupState& warpgroup_state() {
  Block& block = Block::current();
  return block.hopper.warpgroups[block.thread() / kWarpgroup];
}

// By the last thread of a warpgroup that comes to the product.
inline void issue_product(Task product) {
  options.late_products ? warpgroup_state().started.push_back(std::move(product)) : product();
}

inline void wgmma_commit() {
  int nothing = 0;
  Block::current().together<kWarpgroup>("wgmma_commit", nothing, [](int* const*) {
    WarpgroupState& state = warpgroup_state();
    state.committed.push_back(std::move(state.started));
    state.started.clear();
  });
}

template <int kLeft>
void wgmma_wait() {
  int nothing = 0;
  Block::current().together<kWarpgroup>("wgmma_wait", nothing, [](int* const*) {
    WarpgroupState& state = warpgroup_state();
    while (static_cast<int>(state.committed.size()) > kLeft) {
      for (const Task& task : state.committed.front()) task();
      state.committed.pop_front();
    }
  });
}

}  // namespace video_attn::emulation
