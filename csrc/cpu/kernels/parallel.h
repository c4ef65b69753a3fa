// Scratch memory and the loop over tasks.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace video_attn::cpu::CPU_CAPABILITY {

// Uninitialised memory from torch's allocator, aligned to 64 bytes.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : memory_(c10::GetCPUAllocator()->allocate(static_cast<size_t>(size) * sizeof(T))),
        capacity_(size) {}

  // Room for at least `size` elements; what was there is lost.
  void reserve(int64_t size) {
    if (size <= capacity_) return;
    *this = Buffer();  // free before allocating again
    *this = Buffer(size);
  }

  T* data() const { return static_cast<T*>(memory_.get()); }
  T* at(int64_t offset) const { return data() + offset; }

 private:
  at::DataPtr memory_;
  int64_t capacity_ = 0;
};

// Runs tasks 0..count-1 on torch's threads. `make_worker()` is called once per thread, and what it
// returns is called with one task after the other, so that scratch memory is reused. Tasks go to
// whoever is free: lists differ in length. Results must not depend on who runs a task.
template <typename MakeWorker>
void parallel_tasks(int64_t count, const MakeWorker& make_worker) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (int64_t task = next++; task < count; task = next++) worker(task);
  });
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
