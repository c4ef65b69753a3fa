// fp16, bf16 and FP8 (e4m3fn) as bits: conversions that round to nearest, ties to even.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

namespace video_attn::emulation {

// Rounds `x` to a floating-point format with `digits` stored mantissa digits and normal exponents
// from `smallest` on; subnormals below. Neither clamps nor overflows.
inline double round_to_format(double x, int digits, int smallest) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);  // |x| in [2^(exponent - 1), 2^exponent)
  const int last = std::max(exponent - 1, smallest) - digits;
  return std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
}

inline float decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? NAN : static_cast<float>(sign * INFINITY);
  if (exponent == 0) return static_cast<float>(sign * std::ldexp(mantissa, -24));
  return static_cast<float>(sign * std::ldexp(1024 + mantissa, exponent - 25));
}

template <class Bits, int kSize>
std::array<float, kSize> make_table(float (*decode)(Bits)) {
  std::array<float, kSize> table;
  for (int i = 0; i < kSize; ++i) table[i] = decode(static_cast<Bits>(i));
  return table;
}

inline float half_to_float(uint16_t bits) {
  static const auto table = make_table<uint16_t, 65536>(decode_half);
  return table[bits];
}

inline uint16_t float_to_half(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7FFF;
  const double y = std::fabs(round_to_format(x, 10, -14));
  if (y >= 65520.0) return sign | 0x7C00;
  if (y < std::ldexp(1.0, -14)) return sign | static_cast<uint16_t>(std::ldexp(y, 24));
  int exponent;
  const double fraction = std::frexp(y, &exponent);
  return sign | static_cast<uint16_t>((exponent + 14) << 10) |
         static_cast<uint16_t>(std::ldexp(fraction, 11) - 1024);
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float decode_fp8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float sign = bits >> 7 ? -1.0f : 1.0f;
  if (exponent == 15 && mantissa == 7) return NAN;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -9);
  return sign * std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
}

inline float fp8_to_float(uint8_t bits) {
  static const auto table = make_table<uint8_t, 256>(decode_fp8);
  return table[bits];
}

// Clamped to 448; NaN stays NaN.
inline uint8_t float_to_fp8(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7F;
  const double y = std::min(std::fabs(round_to_format(x, 3, -6)), 448.0);
  if (y < std::ldexp(1.0, -6)) return sign | static_cast<uint8_t>(std::ldexp(y, 9));
  int exponent;
  const double fraction = std::frexp(y, &exponent);
  return sign | static_cast<uint8_t>((exponent + 6) << 3) |
         static_cast<uint8_t>(std::ldexp(fraction, 4) - 8);
}

}  // namespace video_attn::emulation
