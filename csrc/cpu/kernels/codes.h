// From numbers to codes and scales, as python/video_attn/quantize.py defines them, over fp32 rows
// in scratch memory. Codes are whole numbers or FP8 or fp16 values: all of them exact in fp32, and
// all but fp16 in bf16 too.
#pragma once

#include <array>
#include <cmath>

#include "cpu/kernels/matrix.h"

namespace video_attn::cpu::CPU_CAPABILITY {

constexpr float kInt8Limit = 127.0f;
constexpr float kE4m3Limit = 448.0f;
constexpr float kHalfValueLimit = 512.0f;   // an fp16 channel's largest value is below it
constexpr float kSmallestAmax = 0x1p-100f;  // below it limit / amax could overflow

// x rounded to nearest, ties to even, to a binary format of 1 + kDigits significant digits whose
// smallest normal number is 2^kMinExponent; x is in the format's range. Adding 1.5 * 2^23 units of
// the last digit leaves no room for more.
template <int kDigits, int kMinExponent>
inline Vec round_to_digits(Vec x) {
  const Vec least(std::ldexp(1.0f, kMinExponent));
  const IntVec exponent =
      at::vec::cast<int32_t, float>(at::vec::maximum(x.abs(), least)) & IntVec(0x7f800000);
  const IntVec steps = exponent + IntVec(((23 - kDigits) << 23) | 0x00400000);
  const Vec shifter = at::vec::cast<float, int32_t>(steps);
  return (x + shifter) - shifter;
}

inline Vec round_to_e4m3(Vec x) { return round_to_digits<3, -6>(x); }
inline Vec round_to_half(Vec x) { return round_to_digits<10, -14>(x); }

// Weights as FP8: times 2^8, the largest power of two that e4m3 holds, which keeps small ones away
// from its subnormals. As fp16 they are what they are.
struct E4m3Rounding {
  static constexpr float kExponent = 8.0f;
  static Vec round(Vec weight) { return round_to_e4m3(weight); }
};
struct HalfRounding {
  static constexpr float kExponent = 0.0f;
  static Vec round(Vec weight) { return round_to_half(weight); }
};

// amax / limit, and limit / amax to multiply with; both 0 for a group that is as good as zero. NaN
// and inf make every code of the group 0 and show through its scale.
struct Scale {
  float scale, inverse;
};

inline Scale scale_of(float amax, float limit) {
  if (amax < kSmallestAmax) return {0.0f, 0.0f};
  return {amax / limit, limit / amax};
}

// For fp16 values: a power of two that brings amax into [256, 512).
inline Scale power_of_two_scale_of(float amax) {
  if (amax < kSmallestAmax) return {0.0f, 0.0f};
  if (!std::isfinite(amax)) return {amax, 0.0f};
  int exponent;
  std::frexp(amax, &exponent);
  exponent -= std::ilogb(kHalfValueLimit);
  return {std::ldexp(1.0f, exponent), std::ldexp(1.0f, -exponent)};
}

// The larger one, NaN if either is.
inline float max_or_nan(float a, float b) { return a > b || std::isnan(a) ? a : b; }

// The larger ones of `largest` and the row's absolute values, lane by lane; NaN stays.
inline Vec amax_lanes(Vec largest, const float* row, int64_t width) {
  for (int64_t i = 0; i < width; i += Vec::size()) {
    largest = at::vec::maximum(largest, Vec::loadu(row + i).abs());
  }
  return largest;
}

inline float amax_of_lanes(Vec largest) {
  alignas(64) float lanes[Vec::size()];
  largest.store(lanes);
  float result = 0.0f;
  for (const float x : lanes) result = max_or_nan(result, x);
  return result;
}

inline float dot(const float* a, const float* b, int64_t width) {
  Vec sum(0.0f);
  for (int64_t i = 0; i < width; i += Vec::size()) {
    sum = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), sum);
  }
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum);
}

inline void subtract_row(float* row, const float* other, int64_t width) {
  for (int64_t i = 0; i < width; i += Vec::size()) {
    (Vec::loadu(row + i) - Vec::loadu(other + i)).store(row + i);
  }
}

// The codes of x * inverse: INT8 for a limit of 127, else FP8.
inline Vec code_of(Vec x, Vec inverse, float limit) {
  const Vec scaled = x * inverse;
  const Vec finite = Vec::blendv(scaled, Vec(0.0f), scaled != scaled);
  const Vec bounded = at::vec::clamp(finite, Vec(-limit), Vec(limit));
  return limit == kInt8Limit ? bounded.round() : round_to_e4m3(bounded);
}

// One row of codes, from fp32 to the type of an operand. uint8 holds code + 128: see matrix.h.
template <typename C>
inline void store_codes(const float* codes, C* target, int64_t width) {
  if constexpr (std::is_same_v<C, uint8_t>) {
    for (int64_t i = 0; i < width; ++i) target[i] = static_cast<int32_t>(codes[i]) + 128;
  } else if constexpr (std::is_same_v<C, int8_t>) {
    for (int64_t i = 0; i < width; ++i) target[i] = static_cast<int32_t>(codes[i]);
  } else {
    row_from_float(codes, target, width);
  }
}

// Rotates a row by a normalised Hadamard matrix, in blocks of the largest power of two that divides
// its length.
inline void hadamard_rotate(float* row, int64_t dim) {
  const int64_t block = dim & -dim;
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t half = 1; half < block; half *= 2) {
    for (int64_t first = 0; first < dim; first += 2 * half) {
      for (int64_t i = first; i < first + half; ++i) {
        const float a = row[i], b = row[i + half];
        row[i] = a + b;
        row[i + half] = a - b;
      }
    }
  }
  for (int64_t i = 0; i < dim; ++i) row[i] *= norm;
}

// The scale group of a row within its tile of kTile tokens.
constexpr int64_t kMaxGroups = 32;

inline int64_t query_group(Granularity granularity, int64_t row) {
  switch (granularity) {
    case Granularity::kPerWarp:
      return row / 16;
    case Granularity::kPerThread:
      return row / 16 * 8 + row % 8;
    default:
      return 0;
  }
}

inline int64_t key_group(Granularity granularity, int64_t row) {
  return granularity == Granularity::kPerThread ? row % 8 / 2 : 0;
}

// One scale per group of rows: row r is in group(r).
template <typename Group>
std::array<Scale, kMaxGroups> scales_of_groups(const float* rows, int64_t width, int64_t row_count,
                                               float limit, const Group& group) {
  std::array<Vec, kMaxGroups> amax;
  amax.fill(Vec(0.0f));
  int64_t groups = 0;
  for (int64_t r = 0; r < row_count; ++r) {
    const int64_t n = group(r);
    amax[n] = amax_lanes(amax[n], rows + r * width, width);
    groups = std::max(groups, n + 1);
  }
  std::array<Scale, kMaxGroups> scales;
  for (int64_t n = 0; n < groups; ++n) scales[n] = scale_of(amax_of_lanes(amax[n]), limit);
  return scales;
}

// Rows of T to fp32 [padded_rows, width], rotated if the recipe says so; padding is 0.
template <typename T>
void load_float_rows(const Rows& x, int64_t batch, int64_t head, int64_t first, int64_t rows,
                     int64_t dim, bool rotate, float* target, int64_t width, int64_t padded_rows) {
  copy_rows(x.at<const T>(batch, head, first), x.row_stride, rows, dim, target, width, padded_rows);
  if (!rotate) return;
  for (int64_t r = 0; r < rows; ++r) hadamard_rotate(target + r * width, dim);
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
