// The softmax of the forward pass over a transposed tile of scores: keys are rows, queries are
// lanes, so that nothing is ever reduced across a vector.
#pragma once

#include "cpu/kernels/matrix.h"

namespace video_attn::cpu::CPU_CAPABILITY {

// Running maximum (base 2, scaled) and sum per query, and what to multiply earlier sums with.
struct RunningSoftmax {
  alignas(64) float maximum[kTile];
  alignas(64) float sum[kTile];
  alignas(64) float correction[kTile];

  void reset() {
    std::fill_n(maximum, kTile, -kInfinity);
    std::fill_n(sum, kTile, 0.0f);
  }
};

// Rows [first, first + valid) of a step hold scores; rows up to `end` are padding and get weight 0.
struct RowSegment {
  int64_t first, valid, end;
};

// Largest score of each of one vector of lanes.
template <typename Segments>
Vec column_maximum(const Segments& segments, const float* scores, int64_t lanes) {
  Vec a(-kInfinity), b(-kInfinity), c(-kInfinity), d(-kInfinity);
  for (const RowSegment& s : segments) {
    const float* row = scores + s.first * lanes;
    int64_t r = 0;
    for (; r + 4 <= s.valid; r += 4, row += 4 * lanes) {
      a = max_ignoring_nan(a, Vec::loadu(row));
      b = max_ignoring_nan(b, Vec::loadu(row + lanes));
      c = max_ignoring_nan(c, Vec::loadu(row + 2 * lanes));
      d = max_ignoring_nan(d, Vec::loadu(row + 3 * lanes));
    }
    for (; r < s.valid; ++r, row += lanes) a = max_ignoring_nan(a, Vec::loadu(row));
  }
  return max_ignoring_nan(max_ignoring_nan(a, b), max_ignoring_nan(c, d));
}

// How weights become operands. The sum that divides them is of the weights before rounding.
struct OperandRounding {
  static constexpr float kExponent = 0.0f;  // weights are multiplied by 2 to this power
  static Vec round(Vec weight) { return weight; }
};

// Weights 2^(scale * score - pivot) of one vector of lanes, rounded and written as operand B;
// returns their sum.
template <typename Rounding, typename C, typename Segments>
Vec column_weights(const Segments& segments, const float* scores, int64_t lanes, Vec scale,
                   Vec pivot, C* weights) {
  Vec sum(0.0f);
  const auto weight = [&](int64_t row) {
    const Vec p = exp2(at::vec::fmsub(Vec::loadu(scores + row * lanes), scale, pivot));
    sum = sum + p;
    return Rounding::round(p);
  };
  for (const RowSegment& s : segments) {
    const int64_t valid_end = s.first + s.valid;
    for (int64_t r = s.first; r < s.end; r += kPair<C>) {
      const Vec even = r < valid_end ? weight(r) : Vec(0.0f);
      if constexpr (std::is_same_v<C, float>) {
        even.store(weights + r * lanes);
      } else {
        const Vec odd = r + 1 < valid_end ? weight(r + 1) : Vec(0.0f);
        interleave_bf16(even, odd).store(weights + r * lanes);
      }
    }
  }
  return sum;
}

// One step: `scores` [rows, lanes] to `weights`, with `state` brought up to date. For fp32 the two
// may be the same memory.
template <typename Rounding, typename C, typename Segments>
void softmax_step(const Segments& segments, int64_t lanes, float scale_log2, const float* scores,
                  C* weights, RunningSoftmax& state) {
  const Vec scale(scale_log2);
  for (int64_t lane = 0; lane < lanes; lane += Vec::size()) {
    const Vec before = Vec::loadu(state.maximum + lane);
    const Vec here = column_maximum(segments, scores + lane, lanes) * scale;
    const Vec now = at::vec::maximum(before, here);
    // A query that has seen nothing yet: any finite pivot gives weights of 0.
    const Vec pivot = Vec::blendv(now, Vec(0.0f), now == Vec(-kInfinity));
    const Vec correction = exp2(before - pivot);
    const Vec sum =
        column_weights<Rounding>(segments, scores + lane, lanes, scale,
                                 pivot - Vec(Rounding::kExponent), weights + lane * kPair<C>);
    now.store(state.maximum + lane);
    correction.store(state.correction + lane);
    at::vec::fmadd(Vec::loadu(state.sum + lane), correction, sum).store(state.sum + lane);
  }
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
