// A thread block on the CPU. Every thread is a fiber; a fiber runs until it reaches something that
// its warp (or its block) does together, and waits there for the others. So warps are in lockstep
// where the hardware has them in lockstep, and nowhere else.
//
// What a kernel must not rely on is made to vary (Options): the order in which threads run, and the
// moment at which asynchronous copies take place. Shared memory starts as NaN bytes.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "hopper_state.h"

namespace video_attn::emulation {

inline constexpr int kWarp = 32;
inline constexpr int kWarpgroup = 128;

struct Options {
  int capability = 89;        // what the launcher takes the device for
  bool late_copies = true;    // asynchronous copies happen at the wait, not at the issue
  bool late_products = true;  // so do the products of warpgroups
  bool last_first = false;    // among the threads that can run, the last to become ready runs first
};

inline Options options;

struct Grid {
  int64_t x;
  int y, z;
};

class Block {
 public:
  Block(int threads, int shared_bytes, Grid index, Grid grid, std::function<void()> body)
      : index(index),
        grid(grid),
        body_(std::move(body)),
        fibers_(threads),
        memory_(shared_bytes + kAlignment, 0xFF),
        shared_bytes_(shared_bytes) {}

  const Grid index, grid;
  HopperState hopper;

  static Block& current() { return *current_; }

  // Runs all threads to their end.
  void run() {
    current_ = this;
    for (int i = 0; i < static_cast<int>(fibers_.size()); ++i) ready_.push_back(i);
    while (!ready_.empty()) {
      running_ = options.last_first ? ready_.back() : ready_.front();
      options.last_first ? ready_.pop_back() : ready_.pop_front();
      resume(fibers_[running_]);
      if (!failure_.empty()) throw std::runtime_error(failure_);
    }
    const std::string stuck = who_waits();
    if (!stuck.empty()) throw std::runtime_error("deadlock:" + stuck);
    if (!hopper.is_idle()) throw std::runtime_error("copies or products in flight at the end");
  }

  int thread() const { return running_; }

  uint32_t shared_offset(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared());
  }

  uint8_t* shared() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (kAlignment - address % kAlignment) % kAlignment;
  }

  void check_shared(const void* pointer, int bytes) {
    const auto* p = static_cast<const uint8_t*>(pointer);
    if (p < shared() || p + bytes > shared() + shared_bytes_)
      fail("an access outside shared memory");
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("a misaligned access to shared memory");
  }

  // All lanes of a warp (or of a warpgroup) call this with the same `name`; the last to arrive does
  // the work for all.
  template <int kSize = kWarp, class Argument, class Work>
  void together(const char* name, Argument& argument, Work work) {
    Group& group = groups_[{kSize, running_ / kSize}];
    if (!group.members.empty() && group.name != name) {
      fail(std::string("threads of a group do different things: ") + group.name + " and " + name);
    }
    group.name = name;
    group.arguments.resize(kSize);
    group.arguments[running_ % kSize] = &argument;
    group.members.push_back(running_);
    if (static_cast<int>(group.members.size()) < kSize) {
      park(name);
      return;
    }
    Argument* arguments[kSize];
    for (int i = 0; i < kSize; ++i) arguments[i] = static_cast<Argument*>(group.arguments[i]);
    work(arguments);
    wake(group.members);
  }

  void barrier() { barrier(0, static_cast<int>(fibers_.size())); }

  void barrier(int number, int threads) {
    std::vector<int>& waiting = barriers_[number];
    waiting.push_back(running_);
    if (static_cast<int>(waiting.size()) < threads) {
      park("a barrier of threads");
    } else {
      wake(waiting);
    }
  }

  // Counts at a barrier without waiting there.
  void arrive(int number, int threads) {
    std::vector<int>& waiting = barriers_[number];
    waiting.push_back(kNobody);
    if (static_cast<int>(waiting.size()) == threads) wake(waiting);
  }

  // The running thread stops until another one wakes it.
  void park(const char* at) {
    Fiber& fiber = fibers_[running_];
    fiber.at = at;
    if (_setjmp(fiber.point) == 0) longjmp_to(scheduler_);
  }

  // Lets `threads` go on, but for the running one, which does so anyway; empties the list.
  void wake(std::vector<int>& threads) {
    std::sort(threads.begin(), threads.end());
    for (int i : threads) {
      if (i != running_ && i != kNobody) ready_.push_back(i);
    }
    threads.clear();
  }

  void copy(void* to, const void* from, int bytes) {
    check_shared(to, bytes);
    if (reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("a misaligned copy");
    if (!options.late_copies) {
      std::memcpy(to, from, bytes);
    } else {
      fibers_[running_].issued.push_back({to, from, bytes});
    }
  }

  void commit_copies() {
    Fiber& fiber = fibers_[running_];
    fiber.committed.insert(fiber.committed.end(), fiber.issued.begin(), fiber.issued.end());
    fiber.issued.clear();
  }

  void wait_for_copies() {
    Fiber& fiber = fibers_[running_];
    for (const Copy& copy : fiber.committed) std::memcpy(copy.to, copy.from, copy.bytes);
    fiber.committed.clear();
  }

  [[noreturn]] void fail(std::string message) {
    failure_ = std::move(message);
    longjmp_to(scheduler_);
  }

 private:
  static constexpr int kNobody = -1;
  static constexpr int kAlignment = 1024;
  static constexpr int kStackBytes = 256 * 1024;

  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };

  struct Fiber {
    ucontext_t start;
    jmp_buf point;
    std::unique_ptr<char[]> stack;
    bool done = false;
    const char* at = "its start";
    std::vector<Copy> issued, committed;
  };

  // For each run of threads that wait at the same: the first of them, and where.
  std::string who_waits() const {
    std::string text;
    const char* last = nullptr;
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const char* at = fibers_[i].done ? nullptr : fibers_[i].at;
      if (at != nullptr && at != last) {
        text += " from thread " + std::to_string(i) + " on at " + at + ";";
      }
      last = at;
    }
    return text;
  }

  struct Group {
    const char* name = "";
    std::vector<void*> arguments;
    std::vector<int> members;  // that have arrived
  };

  // ucontext starts a fiber; after that setjmp switches, which needs no system call.
  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.stack) longjmp_to(fiber.point);
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.start);
    fiber.start.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::enter, 0);
    setcontext(&fiber.start);
  }

  static void enter() {
    Block& block = current();
    block.body_();
    Fiber& fiber = block.fibers_[block.running_];
    if (!fiber.issued.empty() || !fiber.committed.empty())
      block.fail("copies in flight at the end");
    fiber.done = true;
    longjmp_to(block.scheduler_);
  }

  [[noreturn]] static void longjmp_to(jmp_buf& point) { _longjmp(point, 1); }

  inline static thread_local Block* current_ = nullptr;

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::map<std::pair<int, int>, Group> groups_;  // by size and number
  std::map<int, std::vector<int>> barriers_;     // who waits at each
  std::vector<uint8_t> memory_;
  int shared_bytes_;
  std::deque<int> ready_;
  int running_ = 0;
  jmp_buf scheduler_;
  std::string failure_;
};

}  // namespace video_attn::emulation
