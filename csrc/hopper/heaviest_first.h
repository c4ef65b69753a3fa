// Orders work so that no heavy piece is left for the end.
#pragma once

#include "hopper/primitives.h"

namespace video_attn::hopper {

constexpr int32_t kSortThreads = 128;
constexpr int32_t kWeightClasses = 64;
constexpr int32_t kSortBarrier = 1;  // of the threads that sort

struct SortMemory {
  int32_t places[kWeightClasses * kSortThreads];
  int32_t warp_totals[kSortThreads / 32];
  int32_t heaviest, lightest_negated;
  float warp_weights[kSortThreads / 32];  // their sum: all weights together
};

// The first threads of a block write to `order` the items 0 to `count` by falling weight(item): a
// stable counting sort by 64 classes between the lightest and the heaviest, exact where these are
// no further apart. Every thread owns a run of items and, for each class, a counter that becomes
// the place of its next item.
template <class Weight>
__device__ void heaviest_first(SortMemory& memory, int32_t count, int32_t* order, Weight weight) {
  auto& [places, warp_totals, heaviest, lightest_negated, warp_weights] = memory;
  const int32_t thread = threadIdx.x;
  const int32_t run = divide_up(count, kSortThreads);
  const int32_t first = min(thread * run, count);
  const int32_t last = min(first + run, count);
  if (thread == 0) heaviest = lightest_negated = INT32_MIN;
  for (int32_t at = thread; at < kWeightClasses * kSortThreads; at += kSortThreads) places[at] = 0;
  threads_sync<kSortThreads>(kSortBarrier);
  int32_t most = INT32_MIN, least_negated = INT32_MIN;
  float sum = 0;
  for (int32_t item = first; item < last; ++item) {
    const int32_t mine = weight(item);
    most = max(most, mine);
    least_negated = max(least_negated, -mine);
    sum += static_cast<float>(mine);
  }
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
  }
  if (thread % 32 == 0) warp_weights[thread / 32] = sum;
  atomicMax(&heaviest, most);
  atomicMax(&lightest_negated, least_negated);
  threads_sync<kSortThreads>(kSortBarrier);
  const int32_t range = max(heaviest + lightest_negated + 1, kWeightClasses);
  const auto place_of = [&](int32_t item) -> int32_t& {
    const int64_t lighter = static_cast<int64_t>(heaviest - weight(item)) * kWeightClasses;
    return places[static_cast<int32_t>(lighter / range) * kSortThreads + thread];
  };
  for (int32_t item = first; item < last; ++item) ++place_of(item);
  threads_sync<kSortThreads>(kSortBarrier);

  // Exclusive prefix sums over classes, and over threads within a class.
  int32_t* mine = places + thread * kWeightClasses;
  int32_t total = 0;
  for (int32_t i = 0; i < kWeightClasses; ++i) total += mine[i];
  int32_t before = total;
  for (int32_t distance = 1; distance < 32; distance *= 2) {
    const int32_t left = __shfl_up_sync(~0u, before, distance);
    if (thread % 32 >= distance) before += left;
  }
  if (thread % 32 == 31) warp_totals[thread / 32] = before;
  threads_sync<kSortThreads>(kSortBarrier);
  before -= total;
  for (int32_t warp = 0; warp < thread / 32; ++warp) before += warp_totals[warp];
  for (int32_t i = 0; i < kWeightClasses; ++i) {
    const int32_t here = mine[i];
    mine[i] = before;
    before += here;
  }
  threads_sync<kSortThreads>(kSortBarrier);
  for (int32_t item = first; item < last; ++item) order[place_of(item)++] = item;
}

}  // namespace video_attn::hopper
