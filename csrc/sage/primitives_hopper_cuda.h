// Products by whole warpgroups (four warps, 64 rows), which only compute capability 9.0a has. PTX
// manual, "Asynchronous warpgroup level matrix instructions".
#pragma once

#include "primitives_cuda.h"

namespace video_attn::sage {

// -- threads --------------------------------------------------------------------------------------

VIDEO_ATTN_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }
VIDEO_ATTN_DEVICE int shuffle(int x, int lane) { return __shfl_sync(~0u, x, lane); }
VIDEO_ATTN_DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
VIDEO_ATTN_DEVICE void warp_barrier() { __syncwarp(); }
VIDEO_ATTN_DEVICE int first_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }

// -- products of a warpgroup ----------------------------------------------------------------------

// After a wait, for everything that the awaited products have written: reads stay behind this.
template <class T, int kRows>
VIDEO_ATTN_DEVICE void wgmma_results(T (&c)[kRows][4]) {
#pragma unroll
  for (int n = 0; n < kRows; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4 && static_cast<T>(0.5) == 0) {
        asm volatile("" : "+r"(c[n][i])::"memory");
      } else {
        asm volatile("" : "+f"(c[n][i])::"memory");
      }
    }
  }
}

// Lists of 32 and 64 registers, and the accumulators c[n][i] of a tile of 64 columns.
#define SAGE_LIST_32                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SAGE_LIST_64                                                                             \
  SAGE_LIST_32                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SAGE_SUMS_4(kind, c, n) kind(c[n][0]), kind(c[n][1]), kind(c[n][2]), kind(c[n][3])
#define SAGE_SUMS_16(kind, c, n)                                                     \
  SAGE_SUMS_4(kind, c, n), SAGE_SUMS_4(kind, c, n + 1), SAGE_SUMS_4(kind, c, n + 2), \
      SAGE_SUMS_4(kind, c, n + 3)
#define SAGE_SUMS_32(kind, c) SAGE_SUMS_16(kind, c, 0), SAGE_SUMS_16(kind, c, 4)
#define SAGE_SUMS_64(kind, c)                                                   \
  SAGE_SUMS_16(kind, c, 0), SAGE_SUMS_16(kind, c, 4), SAGE_SUMS_16(kind, c, 8), \
      SAGE_SUMS_16(kind, c, 12)

// Scores of 64 queries and two tiles of 64 keys: c (+)= a b, over 32 channels; `a` and `b` are
// descriptors (matrix.h).
VIDEO_ATTN_DEVICE void wgmma_scores(int32_t (&c)[2][8][4], uint64_t a, uint64_t b, bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" SAGE_LIST_64
      "}, %64, %65, p;\n"
      "}"
      : SAGE_SUMS_32("+r", c[0]), SAGE_SUMS_32("+r", c[1])
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
}

VIDEO_ATTN_DEVICE void wgmma_scores(float (&c)[2][8][4], uint64_t a, uint64_t b, bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" SAGE_LIST_64
      "}, %64, %65, p, 1, 1;\n"
      "}"
      : SAGE_SUMS_32("+f", c[0]), SAGE_SUMS_32("+f", c[1])
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
}

// c (+)= p v: p are 32 FP8 weights (of tokens in the order of v_token) or 16 fp16 weights of every
// row, in registers; v has 64 or 128 channels.
VIDEO_ATTN_DEVICE void wgmma_values_fp8(float (&c)[8][4], const uint32_t (&p)[4], uint64_t v,
                                        bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" SAGE_LIST_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1;\n"
      "}"
      : SAGE_SUMS_32("+f", c)
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(static_cast<int>(adds)));
}

VIDEO_ATTN_DEVICE void wgmma_values_fp8(float (&c)[16][4], const uint32_t (&p)[4], uint64_t v,
                                        bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" SAGE_LIST_64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n"
      "}"
      : SAGE_SUMS_64("+f", c)
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(static_cast<int>(adds)));
}

VIDEO_ATTN_DEVICE void wgmma_values_fp16(float (&c)[8][4], const uint32_t (&p)[4], uint64_t v,
                                         bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" SAGE_LIST_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n"
      "}"
      : SAGE_SUMS_32("+f", c)
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(static_cast<int>(adds)));
}

VIDEO_ATTN_DEVICE void wgmma_values_fp16(float (&c)[16][4], const uint32_t (&p)[4], uint64_t v,
                                         bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" SAGE_LIST_64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n"
      "}"
      : SAGE_SUMS_64("+f", c)
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(static_cast<int>(adds)));
}

#undef SAGE_LIST_32
#undef SAGE_LIST_64
#undef SAGE_SUMS_4
#undef SAGE_SUMS_16
#undef SAGE_SUMS_32
#undef SAGE_SUMS_64

}  // namespace video_attn::sage
