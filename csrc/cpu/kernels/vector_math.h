// Vector types and the base-2 exponential. Compiled once per CPU capability, like all of kernels/.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>

namespace video_attn::cpu::CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
using IntVec = at::vec::Vectorized<int32_t>;

// Lanes are padded to this number, a multiple of every vector length.
constexpr int64_t kLaneGrain = 16;
static_assert(kLaneGrain % Vec::size() == 0 && Vec::size() == IntVec::size());

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 2^x for x < 128, relative error below 2e-7; exactly 0 for x <= -127 (and -inf), NaN for NaN.
// Adding `shifter` rounds x to an integer and leaves it, with the exponent bias, in the low bits
// of the mantissa; the polynomial is 2^f on [-1/2, 1/2], fitted for the least relative error.
inline Vec exp2(Vec x) {
  const Vec shifter(12582912.0f + 127.0f);  // 1.5 * 2^23, and the bias
  x = at::vec::clamp_min(x, Vec(-127.0f));
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
  Vec p = at::vec::fmadd(f, Vec(1.326472707e-3f), Vec(9.671512649e-3f));
  p = at::vec::fmadd(p, f, Vec(5.550733744e-2f));
  p = at::vec::fmadd(p, f, Vec(2.402224209e-1f));
  p = at::vec::fmadd(p, f, Vec(6.931469776e-1f));
  p = at::vec::fmadd(p, f, Vec(1.0f));
  const IntVec power = at::vec::cast<int32_t, float>(shifted) << IntVec(23);
  return p * at::vec::cast<float, int32_t>(power);
}

// The larger one, a where b is NaN: a NaN score reaches the result through exp2, not the maximum.
inline Vec max_ignoring_nan(Vec a, Vec b) { return at::vec::clamp_min(a, b); }

}  // namespace video_attn::cpu::CPU_CAPABILITY
