// What csrc/hopper says in PTX, on the CPU: barriers in shared memory, the tensor memory
// accelerator and the order of products. Copies take place at their issue or only when somebody
// waits for them (Options::late_copies); until then their destination holds NaN.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kittens.cuh"

namespace video_attn::hopper {

using emulation::Block;
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

// Shared variables of the running block by name, behind its dynamic shared memory.
inline thread_local std::map<std::string, int> shared_offsets;
inline thread_local int shared_end = 0;
inline constexpr int kStaticSharedBytes = 48 * 1024;
inline constexpr int kSharedAlignment = 1024;

template <class T>
T& shared_variable(const char* name) {
  const auto [found, is_new] = shared_offsets.try_emplace(name, shared_end);
  if (is_new) {
    const int size = (sizeof(T) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    shared_end += size;
  }
  return *reinterpret_cast<T*>(Block::current().shared() + found->second);
}

inline BulkStores& bulk_stores() { return bulk_stores_of_threads[Block::current().thread()]; }

template <class Kernel, class... Arguments>
void launch_blocks(Kernel kernel, uint32_t blocks, int threads, int shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  for (uint32_t i = 0; i < blocks; ++i) {
    bulk_stores_of_threads.clear();
    shared_offsets.clear();
    shared_end = (shared_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    Block block(threads, shared_end + kStaticSharedBytes, {i, 0, 0}, {blocks, 1, 1},
                [&] { kernel(arguments...); });
    block.run();
    for (const auto& [thread, stores] : bulk_stores_of_threads) {
      if (stores.open.empty() && stores.groups.empty()) continue;
      throw std::runtime_error("a bulk store may still read shared memory when its block ends");
    }
  }
}

inline char* shared_memory() { return reinterpret_cast<char*>(Block::current().shared()); }

// -- barriers -------------------------------------------------------------------------------------

inline uint32_t shared_address(const void* pointer) {
  return Block::current().shared_offset(pointer);
}

inline uint8_t* shared_pointer(uint32_t address, int32_t bytes) {
  uint8_t* pointer = Block::current().shared() + address;
  Block::current().check_shared(pointer, 8);
  Block::current().check_shared(pointer + bytes - 8, 8);
  return pointer;
}

inline emulation::MemoryBarrier* barrier_at(uint32_t address) {
  return reinterpret_cast<emulation::MemoryBarrier*>(shared_pointer(address, 8));
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  emulation::barrier_init(barrier_at(barrier), static_cast<int>(arrivals));
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier, uint32_t arrivals = 1) {
  for (uint32_t i = 0; i < arrivals; ++i) emulation::barrier_arrive(barrier_at(barrier));
}
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulation::barrier_arrive_expecting(barrier_at(barrier), static_cast<int>(bytes));
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulation::barrier_wait(barrier_at(barrier), static_cast<int>(parity));
}

template <int kThreads>
void threads_sync(int32_t barrier) {
  Block::current().barrier(barrier, kThreads);
}
template <int kThreads>
void threads_arrive(int32_t barrier) {
  Block::current().arrive(barrier, kThreads);
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

// A copy into shared memory, which nobody may read before it is there.
inline void issue_copy(uint32_t barrier, uint8_t* destination, int32_t bytes, Task copy) {
  std::memset(destination, 0xFF, bytes);
  emulation::issue_copy(barrier_at(barrier), bytes, std::move(copy));
}

inline uint8_t* box_at(const CUtensorMap& map, uint32_t address) {
  if (address % 1024 != 0) Block::current().fail("a box that is not aligned to its swizzle");
  return shared_pointer(address, map.box_rows * 128);
}

inline void load_box(const CUtensorMap* map, uint32_t destination, uint32_t barrier,
                     int32_t channel, int32_t token, int32_t head, int32_t batch) {
  uint8_t* shared = box_at(*map, destination);
  issue_copy(barrier, shared, map->box_rows * 128, [=] {
    each_of_box(*map, shared, {channel, token, head, batch}, [&](uint8_t* to, const char* from) {
      from ? std::memcpy(to, from, map->width) : std::memset(to, 0, map->width);
    });
  });
}

inline void load_bulk(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  if (destination % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || bytes % 16 != 0) {
    Block::current().fail("a misaligned bulk copy");
  }
  uint8_t* shared = shared_pointer(destination, static_cast<int32_t>(bytes));
  issue_copy(barrier, shared, static_cast<int32_t>(bytes),
             [=] { std::memcpy(shared, source, bytes); });
}

inline void issue_store(Task task) {
  emulation::options.late_copies ? bulk_stores().open.push_back(std::move(task)) : task();
}

inline void store_box(const CUtensorMap* map, uint32_t source, int32_t channel, int32_t token,
                      int32_t head, int32_t batch) {
  uint8_t* shared = box_at(*map, source);
  issue_store([=] {
    each_of_box(*map, shared, {channel, token, head, batch}, [&](const uint8_t* from, char* to) {
      if (to != nullptr) std::memcpy(to, from, map->width);
    });
  });
}

inline void add_bulk(float* destination, uint32_t source, uint32_t bytes) {
  const auto* shared =
      reinterpret_cast<const float*>(shared_pointer(source, static_cast<int32_t>(bytes)));
  if (source % 16 != 0 || reinterpret_cast<uintptr_t>(destination) % 16 != 0 || bytes % 16 != 0) {
    Block::current().fail("a misaligned bulk addition");
  }
  issue_store([=] {
    for (uint32_t i = 0; i < bytes / 4; ++i) destination[i] += shared[i];
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
inline void shared_write_fence() {}

// -- products -------------------------------------------------------------------------------------

inline void products_begin() {}
template <int kPending>
void products_wait() {
  emulation::wgmma_wait<kPending>();
}
template <class Registers>
void settle(Registers&) {}
template <class Registers>
void hold_operand(Registers&, uint32_t) {}
template <class Registers>
void product_fence(Registers&) {}

inline float exp2_approximate(float x) { return std::exp2(x); }

}  // namespace video_attn::hopper
