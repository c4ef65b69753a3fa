// Row statistics of the backward, once per query: what the key walk reads with every query tile.
//
// statistics[batch][head][unit][2][64] holds, for the 64 queries of a unit, minus the lse in base 2
// and minus delta, where delta = sum(grad_out * out) - grad_lse. A row that is not valid or saw no
// key holds minus infinity and 0: its probabilities come out as exact zeros.
#pragma once

#include "hopper/backward_config.h"

namespace video_attn::hopper {

constexpr int kPrepareThreads = 256;

struct PrepareGlobals {
  Tensor4 out, grad_out;
  const float* lse;
  const float* grad_lse;
  float* statistics;
  Side q_side;
  int32_t heads, head_dim, units;
};

// The sum of the eight products of two rows' 16 bytes.
template <typename Value>
__device__ inline float dot8(const uint4& left, const uint4& right) {
  using Pair = typename kittens::base_types::packing<Value>::packed_type;
  const Pair* a = reinterpret_cast<const Pair*>(&left);
  const Pair* b = reinterpret_cast<const Pair*>(&right);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = kittens::base_types::convertor<float2, Pair>::convert(a[i]);
    const float2 y = kittens::base_types::convertor<float2, Pair>::convert(b[i]);
    sum += x.x * y.x + x.y * y.y;
  }
  return sum;
}

// One block of threads per unit; 16 threads per row.
template <typename Value>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_backward(const __grid_constant__ PrepareGlobals globals) {
  constexpr float kLog2E = 1.4426950408889634f;
  constexpr int kRowsAtOnce = kPrepareThreads / 16;
  const int unit = blockIdx.x % globals.units;
  const int64_t row_of_heads = blockIdx.x / globals.units;
  const int head = row_of_heads % globals.heads, batch = row_of_heads / globals.heads;
  const int block = static_cast<int64_t>(unit) * kUnit / globals.q_side.block_size;
  const int64_t block_start = static_cast<int64_t>(block) * globals.q_side.block_size;
  const int64_t end = block_start + valid_tokens(globals.q_side, batch, block);
  const int channel = threadIdx.x % 16 * 8;

  const auto load = [&](const Tensor4& tensor, int64_t token) {
    const Value* row = static_cast<const Value*>(tensor.data) + batch * tensor.batch_stride +
                       head * tensor.head_stride + token * tensor.token_stride;
    return *reinterpret_cast<const uint4*>(row + channel);
  };

#pragma unroll
  for (int pass = 0; pass < kUnit / kRowsAtOnce; ++pass) {
    const int row = pass * kRowsAtOnce + threadIdx.x / 16;
    const int64_t token = static_cast<int64_t>(unit) * kUnit + row;
    const int64_t at = row_of_heads * globals.q_side.length + token;
    const float lse = token < end ? globals.lse[at] : -INFINITY;
    const bool counts = lse != -INFINITY;
    float delta = 0.f;
    if (counts && channel < globals.head_dim) {
      delta = dot8<Value>(load(globals.out, token), load(globals.grad_out, token));
    }
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(~0u, delta, lanes);
    if (threadIdx.x % 16 == 0) {
      if (counts && globals.grad_lse != nullptr) delta -= globals.grad_lse[at];
      float* unit_statistics =
          globals.statistics + (row_of_heads * globals.units + unit) * (2 * kUnit);
      unit_statistics[row] = counts ? -lse * kLog2E : -INFINITY;
      unit_statistics[kUnit + row] = -delta;
    }
  }
}

}  // namespace video_attn::hopper
