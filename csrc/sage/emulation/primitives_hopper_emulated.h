// The primitives of compute capability 9.0a on the CPU; see block.h. Operands are found through
// their descriptors as the PTX manual documents them. Products take place at their start or only
// when they are awaited (Options::late_products); late ones read registers and shared memory then,
// so that what is overwritten too early shows.
#pragma once

#include <bit>
#include <cstring>

#include "primitives_emulated.h"

namespace video_attn::sage {

// -- threads --------------------------------------------------------------------------------------

using emulation::ballot;
using emulation::warp_barrier;

inline int shuffle(int x, int lane) { return emulation::shuffle("shuffle", x, lane); }
inline int first_bit(uint32_t x) { return std::countr_zero(x); }

// -- products of a warpgroup ----------------------------------------------------------------------

namespace emulation {

// The operand in shared memory that a descriptor stands for.
class Matrix {
 public:
  explicit Matrix(uint64_t bits)
      : start_(bytes(bits)),
        leading_(bytes(bits >> 16)),
        stride_(bytes(bits >> 32)),
        row_bytes_(bits >> 62 == 1 ? 128 : 64) {
    if (bits >> 62 == 0 || bits >> 62 == 3) Block::current().fail("an unknown swizzle");
  }

  // Byte `at` of row (or column) `index`, where 8 neighbouring ones form a piece.
  const uint8_t* along(int index, int at) const {
    return find(start_ + index / 8 * stride_ + index % 8 * row_bytes_ + at);
  }

  // 16-bit element `index` of the dimension that lies side by side, at `depth` of the other.
  const uint8_t* across(int index, int depth) const {
    const int per_row = row_bytes_ / 2;
    return find(start_ + index / per_row * leading_ + depth / 8 * stride_ + depth % 8 * row_bytes_ +
                index % per_row * 2);
  }

 private:
  static uint32_t bytes(uint64_t field) { return static_cast<uint32_t>(field & 0x3FFF) << 4; }

  const uint8_t* find(uint32_t address) const {
    const uint32_t mask = row_bytes_ == 128 ? 7 : 3;
    address ^= (address >> 7 & mask) << 4;
    return Block::current().shared() + address;
  }

  uint32_t start_, leading_, stride_;
  int row_bytes_;
};

inline double code_value(Int8, const uint8_t* p) { return static_cast<int8_t>(*p); }
inline double code_value(Fp8, const uint8_t* p) { return fp8_to_float(*p); }

// One product of a warpgroup: what its 128 threads give, and where they want the sums.
template <class C>
struct WgmmaArgument {
  C* c;               // columns / 8 times 4 elements, laid out as by mma
  const uint32_t* p;  // weights of a thread, or null
  uint64_t a, b;      // descriptors
  bool adds;
};

// a_value(lanes, row, depth) and b_value(column, depth) find the elements.
template <int kColumns, int kDepth, class C, class AValue, class BValue>
void wgmma_task(WgmmaArgument<C>* const* lanes, AValue a_value, BValue b_value) {
  static thread_local double a[64][kDepth], b[kColumns][kDepth];
  for (int k = 0; k < kDepth; ++k) {
    for (int i = 0; i < 64; ++i) a[i][k] = a_value(lanes, i, k);
    for (int i = 0; i < kColumns; ++i) b[i][k] = b_value(i, k);
  }
  for (int l = 0; l < kWarpgroup; ++l) {
    for (int j = 0; j < kColumns / 2; ++j) {
      const int row = l / 32 * 16 + l % 32 / 4 + j % 4 / 2 * 8;
      const int column = j / 4 * 8 + l % 4 * 2 + j % 2;
      double sum = lanes[l]->adds ? static_cast<double>(lanes[l]->c[j]) : 0.0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[column][k];
      lanes[l]->c[j] = static_cast<C>(sum);
    }
  }
}

// Starts `task(arguments)` for the whole warpgroup.
template <class C, class Task_>
void start_product(const char* name, WgmmaArgument<C> argument, Task_ task) {
  Block::current().together<kWarpgroup>(name, argument, [&](WgmmaArgument<C>* const* lanes) {
    std::vector<WgmmaArgument<C>> all;
    for (int l = 0; l < kWarpgroup; ++l) {
      all.push_back(*lanes[l]);
      if (all[l].a != all[0].a || all[l].b != all[0].b || all[l].adds != all[0].adds) {
        Block::current().fail("threads of a warpgroup give different operands");
      }
    }
    issue_product([all, task]() mutable {
      WgmmaArgument<C>* pointers[kWarpgroup];
      for (int l = 0; l < kWarpgroup; ++l) pointers[l] = &all[l];
      task(pointers);
    });
  });
}

template <class Code, class C>
void scores(C* c, uint64_t a, uint64_t b, bool adds) {
  start_product("wgmma_scores", WgmmaArgument<C>{c, nullptr, a, b, adds},
                [a, b](WgmmaArgument<C>* const* lanes) {
                  const Matrix queries(a), keys(b);
                  wgmma_task<128, 32>(
                      lanes,
                      [&](auto, int i, int k) { return code_value(Code{}, queries.along(i, k)); },
                      [&](int i, int k) { return code_value(Code{}, keys.along(i, k)); });
                });
}

// Element (row, k) of weights in registers, laid out as operand A of mma.
template <class Code>
double weight(WgmmaArgument<float>* const* lanes, int row, int k) {
  constexpr int w = Code::kPerWord;
  const int lane = row / 16 * 32 + row % 8 * 4 + k / w % 4;
  return Code::value(lanes[lane]->p[row % 16 / 8 + k / w / 4 * 2], k % w);
}

}  // namespace emulation

template <class T, int kRows>
void wgmma_results(T (&)[kRows][4]) {}

inline void wgmma_scores(int32_t (&c)[2][8][4], uint64_t a, uint64_t b, bool adds) {
  emulation::scores<emulation::Int8>(&c[0][0][0], a, b, adds);
}
inline void wgmma_scores(float (&c)[2][8][4], uint64_t a, uint64_t b, bool adds) {
  emulation::scores<emulation::Fp8>(&c[0][0][0], a, b, adds);
}

template <int kRows>
void wgmma_values_fp8(float (&c)[kRows][4], const uint32_t (&p)[4], uint64_t v, bool adds) {
  using namespace emulation;
  start_product("wgmma_values_fp8", WgmmaArgument<float>{&c[0][0], p, 0, v, adds},
                [v](WgmmaArgument<float>* const* lanes) {
                  const Matrix values(v);
                  wgmma_task<kRows * 8, 32>(lanes, weight<Fp8>, [&](int i, int k) {
                    return code_value(Fp8{}, values.along(i, k));
                  });
                });
}

template <int kRows>
void wgmma_values_fp16(float (&c)[kRows][4], const uint32_t (&p)[4], uint64_t v, bool adds) {
  using namespace emulation;
  start_product("wgmma_values_fp16", WgmmaArgument<float>{&c[0][0], p, 0, v, adds},
                [v](WgmmaArgument<float>* const* lanes) {
                  const Matrix values(v);
                  wgmma_task<kRows * 8, 16>(lanes, weight<Fp16>, [&](int i, int k) {
                    uint16_t bits;
                    std::memcpy(&bits, values.across(i, k), 2);
                    return static_cast<double>(emulation::half_to_float(bits));
                  });
                });
}

inline bool has_warpgroup_code() { return emulation::options.capability == 90; }

}  // namespace video_attn::sage
