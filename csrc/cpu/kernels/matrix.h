// Matrix products of fp32 or bf16 operands with fp32 results, and of 8-bit integers with int32
// results, on ATen's own kernels, and the layouts they want. In C = A B, A is row-major, and B too,
// except that a B of short numbers holds groups of rows interleaved ("VNNI"): [K/2, N, 2] for bf16,
// [K/4, N, 4] for integers.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <type_traits>

#include "cpu/arguments.h"
#include "cpu/kernels/vector_math.h"

namespace video_attn::cpu::CPU_CAPABILITY {

// Rows of B that are interleaved: the inner dimension of a product is padded to this number.
template <typename C>
constexpr int64_t kPair = sizeof(float) / sizeof(C);

// Rows of an operand A are padded to this number, to keep the shapes of products few.
constexpr int64_t kRowGrain = 8;

// Columns of a packed row of `dim` numbers.
template <typename C>
constexpr int64_t row_width(int64_t dim) {
  return round_up(dim, kLaneGrain * kPair<C>);
}

// C[m, n] = A[m, k] B[k, n], or += with `accumulate`. Every (m, n, k) is a kernel compiled at its
// first use on a thread, so callers keep to few shapes: m in multiples of 8, n of 16.
template <typename C>
inline void multiply(int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* b,
                     int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  constexpr bool is_vnni = !std::is_same_v<C, float>;
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, is_vnni);
}

// The same for integers: the left operand is unsigned, because only that product exists on every
// CPU with VNNI (signed with signed needs AMX, and without it gives wrong sums).
inline void multiply(int64_t m, int64_t n, int64_t k, const uint8_t* a, int64_t lda,
                     const int8_t* b, int64_t ldb, int32_t* c, int64_t ldc) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, /*add_C=*/false, a, b, c, /*is_vnni=*/true);
}

// Calls f<T, C>(): T is the dtype of the tensors, C that of the operands of products. fp16 goes
// through fp32: few CPUs multiply it, and bf16 would lose its bits.
template <typename F>
void with_dtypes(const Geometry& geometry, const F& f) {
  switch (geometry.dtype) {
    case at::kFloat:
      return f.template operator()<float, float>();
    case at::kHalf:
      return f.template operator()<at::Half, float>();
    case at::kBFloat16:
#if defined(CPU_CAPABILITY_AVX512)
      if (geometry.bf16_products) return f.template operator()<at::BFloat16, at::BFloat16>();
#endif
      return f.template operator()<at::BFloat16, float>();
    default:
      TORCH_CHECK_TYPE(false, "q must be float32, bfloat16 or float16, got ", geometry.dtype);
  }
}

// The kernels for short numbers may hold the tile registers of the CPU until they are told to let
// go.
template <typename C>
struct ReleaseMatrixUnit {
  ReleaseMatrixUnit() = default;
  ReleaseMatrixUnit(const ReleaseMatrixUnit&) = delete;
  ReleaseMatrixUnit& operator=(const ReleaseMatrixUnit&) = delete;
  ~ReleaseMatrixUnit() { at::native::cpublas::brgemm_release(!std::is_same_v<C, float>); }
};

// One row of n numbers to fp32, and back.
template <typename T>
inline void row_to_float(const T* source, float* target, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(target, source, n * sizeof(float));
  } else {
    using Short = at::vec::Vectorized<T>;
    int64_t i = 0;
    for (; i + Short::size() <= n; i += Short::size()) {
      const auto [low, high] = at::vec::convert_to_float<T>(Short::loadu(source + i));
      low.store(target + i);
      high.store(target + i + Vec::size());
    }
    if (i == n) return;
    const auto [low, high] = at::vec::convert_to_float<T>(Short::loadu(source + i, n - i));
    low.store(target + i, std::min<int64_t>(n - i, Vec::size()));
    if (n - i > Vec::size()) high.store(target + i + Vec::size(), n - i - Vec::size());
  }
}

template <typename T>
inline void row_from_float(const float* source, T* target, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(target, source, n * sizeof(float));
  } else {
    using Short = at::vec::Vectorized<T>;
    int64_t i = 0;
    for (; i + Short::size() <= n; i += Short::size()) {
      const Vec low = Vec::loadu(source + i), high = Vec::loadu(source + i + Vec::size());
      at::vec::convert_from_float<T>(low, high).store(target + i);
    }
    if (i == n) return;
    const Vec low = Vec::loadu(source + i, std::min<int64_t>(n - i, Vec::size()));
    const Vec high =
        n - i > Vec::size() ? Vec::loadu(source + i + Vec::size(), n - i - Vec::size()) : Vec(0.0f);
    at::vec::convert_from_float<T>(low, high).store(target + i, n - i);
  }
}

// n rows of T, `stride` apart, to rows of C with `width` columns; the rest of [padded_rows, width]
// becomes 0.
template <typename T, typename C>
void copy_rows(const T* source, int64_t stride, int64_t rows, int64_t columns, C* target,
               int64_t width, int64_t padded_rows) {
  for (int64_t r = 0; r < rows; ++r) {
    C* row = target + r * width;
    if constexpr (std::is_same_v<T, C>) {
      std::memcpy(row, source + r * stride, columns * sizeof(T));
    } else {
      row_to_float(source + r * stride, row, columns);
    }
    std::memset(static_cast<void*>(row + columns), 0, (width - columns) * sizeof(C));
  }
  std::memset(static_cast<void*>(target + rows * width), 0,
              (padded_rows - rows) * width * sizeof(C));
}

// Transpose of 32-bit words, [rows, columns] to [columns, rows]; both multiples of 16.
inline void transpose_words(const float* source, int64_t ld_source, float* target,
                            int64_t ld_target, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      at::vec::transpose_mxn<float, 16, 16>(source + r * ld_source + c, ld_source,
                                            target + c * ld_target + r, ld_target);
    }
  }
}

// rows [n, width] to the operand B = rows^T [width, n], where n is a multiple of 16. In VNNI order
// that is a transpose of pairs.
template <typename C>
void transpose_to_b(const C* rows, int64_t width, C* target, int64_t n) {
  const int64_t words = width / kPair<C>;
  transpose_words(reinterpret_cast<const float*>(rows), words, reinterpret_cast<float*>(target), n,
                  n, words);
}

// rows [n, width] to the operand A = rows^T [width, n], ld n.
template <typename C>
void transpose_to_a(const C* rows, int64_t width, C* target, int64_t n) {
  if constexpr (std::is_same_v<C, float>) {
    transpose_words(rows, width, target, n, n, width);
  } else {
    for (int64_t r = 0; r < n; r += 32) {
      for (int64_t c = 0; c < width; c += 32) {
        at::vec::transpose_mxn<C>(rows + r * width + c, width, target + c * n + r, n,
                                  std::min<int64_t>(32, n - r), std::min<int64_t>(32, width - c));
      }
    }
  }
}

// Two fp32 vectors as one of words: bf16 of `even` in the low halves, of `odd` in the high ones,
// rounded to nearest, ties away from zero. A NaN stays one: it comes from bf16 operands, so the
// bits that rounding touches are 0.
inline IntVec interleave_bf16(Vec even, Vec odd) {
  const auto rounded = [](Vec x) {
    const IntVec bits = at::vec::cast<int32_t, float>(x);
    return bits + IntVec(0x8000);
  };
  return ((rounded(even) >> IntVec(16)) & IntVec(0xffff)) |
         (rounded(odd) & IntVec(static_cast<int32_t>(0xffff0000)));
}

// rows [n, width] to the operand B = rows, n even.
template <typename C>
void pack_b(const C* rows, int64_t width, C* target, int64_t n) {
  if constexpr (std::is_same_v<C, float>) {
    std::memcpy(target, rows, n * width * sizeof(float));
  } else {
    using Short = at::vec::Vectorized<C>;
    for (int64_t r = 0; r < n; r += 2) {
      for (int64_t c = 0; c < width; c += Short::size()) {
        const C* source = rows + r * width + c;
        const auto [even_low, even_high] = at::vec::convert_to_float<C>(Short::loadu(source));
        const auto [odd_low, odd_high] = at::vec::convert_to_float<C>(Short::loadu(source + width));
        C* pairs = target + r * width + 2 * c;
        interleave_bf16(even_low, odd_low).store(pairs);
        interleave_bf16(even_high, odd_high).store(pairs + Short::size());
      }
    }
  }
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
