// What a thread block of compute capability 9.0 has beyond block.h: memory barriers with copies on
// their way, and products of warpgroups that have been started and not awaited.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <vector>

namespace video_attn::emulation {

using Task = std::function<void()>;

struct BarrierState {
  int arrivals = 0;          // that end a phase
  int missing = 0;           // of them, in this phase
  int64_t bytes = 0;         // expected and not copied yet
  int parity = 0;            // of this phase
  std::vector<int> waiting;  // threads
  std::vector<Task> copies;  // not done yet
};

struct WarpgroupState {
  std::vector<Task> started;                // not committed
  std::deque<std::vector<Task>> committed;  // groups, oldest first
};

struct HopperState {
  std::map<const void*, BarrierState> barriers;
  std::map<int, WarpgroupState> warpgroups;

  bool is_idle() const {
    for (const auto& [address, barrier] : barriers) {
      if (!barrier.copies.empty()) return false;
    }
    for (const auto& [number, warpgroup] : warpgroups) {
      if (!warpgroup.started.empty() || !warpgroup.committed.empty()) return false;
    }
    return true;
  }
};

}  // namespace video_attn::emulation
