// The primitives on the CPU, with the lane layouts that the PTX manual documents; see block.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../feature.h"
#include "device/primitives.h"
#include "emulation/numbers.h"

namespace video_attn::sage {

namespace emulation {
using namespace video_attn::emulation;
}

using emulation::float_to_bfloat16;
using emulation::half_to_float;
using emulation::kWarp;
using emulation::kWarpgroup;

// -- threads --------------------------------------------------------------------------------------

inline int thread_index() { return Block::current().thread(); }
inline int64_t block_index_x() { return Block::current().index.x; }
inline int block_index_y() { return Block::current().index.y; }
inline int block_index_z() { return Block::current().index.z; }
inline int64_t grid_size_x() { return Block::current().grid.x; }
inline void block_barrier() { Block::current().barrier(); }

template <class T>
inline T shuffle_xor(T x, int mask) {
  return emulation::shuffle("shuffle_xor", x, emulation::lane_index() ^ mask);
}

inline uint32_t computed_afresh(uint32_t x) { return x; }

// -- copies from global to shared memory ----------------------------------------------------------

inline void copy_async(void* shared, const void* global) {
  Block::current().copy(shared, global, 16);
}
inline void copy_async_commit() { Block::current().commit_copies(); }
inline void copy_async_wait_all() { Block::current().wait_for_copies(); }

// -- matrix fragments -----------------------------------------------------------------------------

namespace emulation {

struct LoadArgument {
  uint32_t* r;
  const void* row;
};

// Matrix m: its row i comes from lane 8 m + i. Lane l receives elements 2 (l % 4) and 2 (l % 4) + 1
// of row l / 4, or, transposed, of column l / 4.
template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  Block::current().check_shared(row, 16);
  LoadArgument mine{r, row};
  Block::current().together(
      kTransposed ? "ldmatrix.trans" : "ldmatrix", mine, [](LoadArgument* const* lanes) {
        for (int m = 0; m < 4; ++m) {
          uint16_t matrix[8][8];
          for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], lanes[m * 8 + i]->row, 16);
          for (int l = 0; l < kWarp; ++l) {
            const int row = l / 4, column = l % 4 * 2;
            const uint32_t low = kTransposed ? matrix[column][row] : matrix[row][column];
            const uint32_t high = kTransposed ? matrix[column + 1][row] : matrix[row][column + 1];
            lanes[l]->r[m] = high << 16 | low;
          }
        }
      });
}

// One register holds kPerWord neighbouring elements of a row of A or a column of B.
struct Int8 {
  static constexpr int kPerWord = 4;
  static double value(uint32_t word, int i) { return static_cast<int8_t>(word >> (i * 8)); }
};
struct Fp8 {
  static constexpr int kPerWord = 4;
  static double value(uint32_t word, int i) {
    return fp8_to_float(static_cast<uint8_t>(word >> (i * 8)));
  }
};
struct Fp16 {
  static constexpr int kPerWord = 2;
  static double value(uint32_t word, int i) {
    return emulation::half_to_float(static_cast<uint16_t>(word >> (i * 16)));
  }
};

template <class C>
struct MmaArgument {
  C* c;
  const uint32_t* a;
  uint32_t b[2];
};

// Elements of c: {row l / 4, row l / 4 + 8} x columns 2 (l % 4) + {0, 1}.
inline double c_value(const int32_t* c, int i) { return c[i]; }
inline double c_value(const float* c, int i) { return c[i]; }
inline double c_value(const uint32_t* c, int i) {
  return emulation::half_to_float(static_cast<uint16_t>(c[i / 2] >> (i % 2 * 16)));
}
inline void set_c(int32_t* c, int i, double x) { c[i] = static_cast<int32_t>(x); }
inline void set_c(float* c, int i, double x) { c[i] = static_cast<float>(x); }
inline void set_c(uint32_t* c, int i, double x) {
  const int shift = i % 2 * 16;
  c[i / 2] = (c[i / 2] & ~(0xFFFFu << shift)) | static_cast<uint32_t>(emulation::float_to_half(x))
                                                    << shift;
}

// m16n8k(8 * kPerWord): with w = kPerWord, lane l has of A, in register j, row l / 4 + 8 (j % 2),
// columns w (l % 4 + 4 (j / 2)) + {0 .. w - 1}; of B, in register j, column l / 4, rows
// w (l % 4 + 4 j) + {0 .. w - 1}. The sum is rounded once: what the hardware does in between is
// not documented.
template <class Code, class C>
void mma(const char* name, C* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArgument<C> mine{c, a, {b0, b1}};
  Block::current().together(name, mine, [](MmaArgument<C>* const* lanes) {
    constexpr int w = Code::kPerWord, depth = 8 * w;
    double a[16][depth], b[depth][8];
    for (int l = 0; l < kWarp; ++l) {
      for (int i = 0; i < w; ++i) {
        for (int j = 0; j < 4; ++j) {
          a[l / 4 + 8 * (j % 2)][w * (l % 4 + 4 * (j / 2)) + i] = Code::value(lanes[l]->a[j], i);
        }
        for (int j = 0; j < 2; ++j) {
          b[w * (l % 4 + 4 * j) + i][l / 4] = Code::value(lanes[l]->b[j], i);
        }
      }
    }
    for (int l = 0; l < kWarp; ++l) {
      for (int i = 0; i < 4; ++i) {
        double sum = c_value(lanes[l]->c, i);
        for (int k = 0; k < depth; ++k) sum += a[l / 4 + 8 * (i / 2)][k] * b[k][l % 4 * 2 + i % 2];
        set_c(lanes[l]->c, i, sum);
      }
    }
  });
}

}  // namespace emulation

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices<false>(r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices<true>(r, row);
}
inline void mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma<emulation::Int8>("mma_int8", c, a, b0, b1);
}
template <class C, int kSize>
inline void mma_fp16(C (&c)[kSize], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma<emulation::Fp16>("mma_fp16", c, a, b0, b1);
}
template <class C, int kSize>
inline void mma_fp8(C (&c)[kSize], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma<emulation::Fp8>("mma_fp8", c, a, b0, b1);
}

inline uint32_t pack_fp8(float x0, float x1, float x2, float x3) {
  using emulation::float_to_fp8;
  return float_to_fp8(x0) | float_to_fp8(x1) << 8 | float_to_fp8(x2) << 16 |
         static_cast<uint32_t>(float_to_fp8(x3)) << 24;
}

// -- numbers --------------------------------------------------------------------------------------

inline float as_float(int32_t bits) { return std::bit_cast<float>(bits); }
inline float as_float(float x) { return x; }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float divide(float a, float b) { return a / b; }

inline int round_to_int8(float x) {
  return std::isnan(x) ? 0 : static_cast<int>(std::clamp(std::nearbyint(x), -128.0f, 127.0f));
}

inline uint16_t float_to_half(float x) { return emulation::float_to_half(x); }
inline uint32_t pack_half2(float low, float high) {
  return static_cast<uint32_t>(float_to_half(high)) << 16 | float_to_half(low);
}
inline float low_half(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair)); }
inline float high_half(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair >> 16)); }

// -- launches -------------------------------------------------------------------------------------

template <class Kernel>
const char* launch(const typename Kernel::Params& params, int64_t x, int y, int z, void*) {
  for (int k = 0; k < z; ++k) {
    for (int j = 0; j < y; ++j) {
      for (int64_t i = 0; i < x; ++i) {
        Block block(Kernel::kThreads, Kernel::kSharedBytes, {i, j, k}, {x, y, z},
                    [&params] { Kernel::run(params); });
        block.run();
      }
    }
  }
  return nullptr;
}

}  // namespace video_attn::sage
