// The primitives of csrc/hopper on the CPU. Copies take place at their issue or only when somebody
// waits for them (Options::late_copies); until then their destination holds NaN.
#pragma once

#include <deque>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "device/primitives.h"

namespace video_attn::hopper {

using emulation::Task;

// -- launches -------------------------------------------------------------------------------------

// The bulk stores of one thread.
struct BulkStores {
  std::vector<Task> open;
  std::deque<std::vector<Task>> groups;

  void finish(int pending) {
    while (static_cast<int>(groups.size()) > pending) {
      for (const Task& task : groups.front()) task();
      groups.pop_front();
    }
  }
};

inline thread_local std::map<int, BulkStores> bulk_stores_of_threads;

inline BulkStores& bulk_stores() { return bulk_stores_of_threads[Block::current().thread()]; }

template <class... Parameters, class... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), uint32_t blocks, int threads,
                          int shared_bytes, cudaStream_t, const Arguments&... arguments) {
  for (uint32_t i = 0; i < blocks; ++i) {
    bulk_stores_of_threads.clear();
    Block block(threads, shared_bytes, {i, 0, 0}, {blocks, 1, 1}, [&] { kernel(arguments...); });
    block.run();
    for (const auto& [thread, stores] : bulk_stores_of_threads) {
      if (stores.open.empty() && stores.groups.empty()) continue;
      throw std::runtime_error("a bulk store may still read shared memory when its block ends");
    }
  }
  return cudaSuccess;
}

// -- the tensor memory accelerator ----------------------------------------------------------------

// Hands each element of a box to use(address in shared memory, address in memory or null).
template <class Use>
void each_of_box(const CUtensorMap& map, uint8_t* shared, const int32_t (&at)[4], Use use) {
  const int32_t per_chunk = 16 / map.width;
  for (int32_t row = 0; row < map.box_rows; ++row) {
    for (int32_t i = 0; i < map.box_channels; ++i) {
      const int64_t place[4] = {int64_t{at[0]} + i, int64_t{at[1]} + row, at[2], at[3]};
      bool inside = true;
      for (int d = 0; d < 4; ++d) {
        inside = inside && place[d] >= 0 && place[d] < static_cast<int64_t>(map.sizes[d]);
      }
      char* element = map.data + place[0] * map.width;
      for (int d = 0; d < 3; ++d) element += place[d + 1] * static_cast<int64_t>(map.strides[d]);
      const int32_t chunk = (i / per_chunk) ^ (row % 8);
      use(shared + row * 128 + chunk * 16 + i % per_chunk * map.width, inside ? element : nullptr);
    }
  }
}

inline void prefetch_tensor_map(const CUtensorMap*) {}

// `bytes` of shared memory that a copy reads or writes.
inline uint8_t* copied(const void* pointer, int32_t bytes, uint32_t alignment) {
  auto* shared = static_cast<uint8_t*>(const_cast<void*>(pointer));
  Block::current().check_shared(shared, 8);
  Block::current().check_shared(shared + bytes - 8, 8);
  if (shared_address(shared) % alignment != 0) Block::current().fail("a misaligned bulk copy");
  return shared;
}

inline void load_box(const CUtensorMap* map, void* destination, MemoryBarrier* barrier,
                     int32_t channel, int32_t token, int32_t head, int32_t batch) {
  const int32_t bytes = map->box_rows * 128;
  uint8_t* shared = copied(destination, bytes, 1024);
  std::memset(shared, 0xFF, bytes);
  emulation::issue_copy(barrier, bytes, [=] {
    each_of_box(*map, shared, {channel, token, head, batch}, [&](uint8_t* to, const char* from) {
      from ? std::memcpy(to, from, map->width) : std::memset(to, 0, map->width);
    });
  });
}

inline void issue_store(Task task) {
  emulation::options.late_copies ? bulk_stores().open.push_back(std::move(task)) : task();
}

inline void store_box(const CUtensorMap* map, const void* source, int32_t channel, int32_t token,
                      int32_t head, int32_t batch) {
  uint8_t* shared = copied(source, map->box_rows * 128, 1024);
  issue_store([=] {
    each_of_box(*map, shared, {channel, token, head, batch}, [&](const uint8_t* from, char* to) {
      if (to != nullptr) std::memcpy(to, from, map->width);
    });
  });
}

inline void add_bulk(float* destination, const void* source, int32_t bytes) {
  const auto* shared = reinterpret_cast<const float*>(copied(source, bytes, 16));
  if (reinterpret_cast<uintptr_t>(destination) % 16 != 0 || bytes % 16 != 0) {
    Block::current().fail("a misaligned bulk addition");
  }
  issue_store([=] {
    for (int32_t i = 0; i < bytes / 4; ++i) destination[i] += shared[i];
  });
}

inline void store_commit() {
  BulkStores& stores = bulk_stores();
  stores.groups.push_back(std::move(stores.open));
  stores.open.clear();
}
template <int kPending>
void store_wait_read() {
  bulk_stores().finish(kPending);
}

// -- products -------------------------------------------------------------------------------------

template <class Registers>
void settle(Registers&) {}
template <class Registers>
void hold_operand(Registers&, uint32_t) {}

inline float exp2_approximate(float x) { return std::exp2(x); }

}  // namespace video_attn::hopper
