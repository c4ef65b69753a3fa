// The online softmax of a warpgroup, in base 2, on accumulators of 64 query rows: a thread holds
// two rows, eight apart, of every 16 x 16 tile of its warp, and shares each with 3 lanes.
#pragma once

#include <cmath>

#include "hopper/primitives.h"
#include "hopper/step_list.h"
#include "kittens.cuh"

namespace video_attn::hopper {

constexpr int32_t kRowsPerThread = 2;

using Scores = kittens::rt_fl<16, kStepTokens>;

// Of the four lanes that share a row.
__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// Hands `use` every pair of neighbouring accumulators of this thread's row `row` (0 or 1).
template <class Tile, class Use>
__device__ inline void for_each_pair(Tile& tile, int32_t row, Use use) {
#pragma unroll
  for (int32_t column = 0; column < Tile::width; ++column) {
    use(tile.tiles[0][column].data[row]);
    use(tile.tiles[0][column].data[row + 2]);
  }
}

// Scores of keys past the valid ones of the two halves of a step become minus infinity.
__device__ inline void mask_scores(Scores& scores, int32_t first_valid, int32_t second_valid) {
  const int32_t lane_key = threadIdx.x % 4 * 2;
#pragma unroll
  for (int32_t column = 0; column < Scores::width; ++column) {
    const bool first = column * 16 < kUnit;
    const int32_t valid = first ? first_valid : second_valid;
#pragma unroll
    for (int32_t part = 0; part < 4; ++part) {
      const int32_t key = column * 16 - (first ? 0 : kUnit) + part / 2 * 8 + lane_key;
      float2& pair = scores.tiles[0][column].data[part];
      pair.x = key < valid ? pair.x : -INFINITY;
      pair.y = key + 1 < valid ? pair.y : -INFINITY;
    }
  }
}

class Softmax {
 public:
  // `scale` is that of the scores times log2(e), above zero.
  __device__ explicit Softmax(float scale) : scale_(scale) {}

  // Scores of the first step become weights.
  __device__ void first(Scores& scores) {
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) {
      maximum_[row] = quad_max(local_maximum(scores, row));
      sum_[row] = 0.0f;
    }
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) exponentiate(scores, row);
  }

  // Takes the scores of a further step into account. True, for the whole warp alike, when the
  // output so far must be rescaled. The maximum may stay behind the true one by a factor of 2^8 of
  // weights: they are as exact there, and most steps rescale nothing.
  __device__ bool follow(Scores& scores) {
    const float maxima[kRowsPerThread] = {local_maximum(scores, 0), local_maximum(scores, 1)};
    const bool grown = (maxima[0] - maximum_[0]) * scale_ > kMaximumLag ||
                       (maxima[1] - maximum_[1]) * scale_ > kMaximumLag;
    const bool rescaled = __any_sync(~0u, grown);
    if (rescaled) {
#pragma unroll
      for (int32_t row = 0; row < kRowsPerThread; ++row) {
        const float maximum = fmaxf(maximum_[row], quad_max(maxima[row]));
        correction_[row] = exp2_approximate((maximum_[row] - maximum) * scale_);
        maximum_[row] = maximum;
        sum_[row] *= correction_[row];
      }
    }
    return rescaled;
  }

  // The scores of one row become weights.
  __device__ void exponentiate(Scores& scores, int32_t row) {
    const float shift = -maximum_[row] * scale_;
    float even = 0.0f, odd = 0.0f;
    for_each_pair(scores, row, [&](float2& pair) {
      pair.x = exp2_approximate(fmaf(pair.x, scale_, shift));
      pair.y = exp2_approximate(fmaf(pair.y, scale_, shift));
      even += pair.x;
      odd += pair.y;
    });
    sum_[row] += even + odd;
  }

  template <class Output>
  __device__ void rescale(Output& output) const {
#pragma unroll
    for (int32_t row = 0; row < kRowsPerThread; ++row) {
      for_each_pair(output, row, [&](float2& pair) {
        pair.x *= correction_[row];
        pair.y *= correction_[row];
      });
    }
  }

  // The sum of a row's weights, in all of its lanes.
  __device__ float total(int32_t row) const { return quad_sum(sum_[row]); }

  // The natural logarithm of the sum of the exponentials of a row.
  __device__ float log_sum(int32_t row, float total) const {
    constexpr float kLn2 = 0.6931471805599453f;
    return (maximum_[row] * scale_ + log2f(total)) * kLn2;
  }

 private:
  static constexpr float kMaximumLag = 8.0f;

  // Of what this thread holds of a row.
  __device__ float local_maximum(Scores& scores, int32_t row) const {
    float even = -INFINITY, odd = -INFINITY;
    for_each_pair(scores, row, [&](float2& pair) {
      even = fmaxf(even, pair.x);
      odd = fmaxf(odd, pair.y);
    });
    return fmaxf(even, odd);
  }

  float scale_;
  float maximum_[kRowsPerThread] = {};
  float sum_[kRowsPerThread] = {};
  float correction_[kRowsPerThread] = {};
};

}  // namespace video_attn::hopper
