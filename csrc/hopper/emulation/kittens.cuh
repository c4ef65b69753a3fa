// Of ThunderKittens what csrc/hopper uses, for the host emulation: tiles in registers and in shared
// memory with the layouts of sm_90, and the products of a warpgroup. A product takes place at its
// start or only when it is awaited (Options::late_products); a late one reads and writes registers
// and shared memory then, so that what is overwritten or used too early shows.
#pragma once

#include <type_traits>
#include <vector>

#include "cuda_runtime.h"
#include "emulation/numbers.h"

namespace kittens {

struct bf16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};
struct bf16_2 {
  bf16 x, y;
};
struct half_2 {
  half x, y;
};

namespace emulated {

using namespace video_attn::emulation;

inline float value(float x) { return x; }
inline float value(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float value(half x) { return half_to_float(x.bits); }
inline void set(float& to, float x) { to = x; }
inline void set(bf16& to, float x) { to.bits = float_to_bfloat16(x); }
inline void set(half& to, float x) { to.bits = float_to_half(x); }

}  // namespace emulated

namespace base_types {

template <class T>
struct packing;
template <>
struct packing<float> {
  using packed_type = float2;
};
template <>
struct packing<bf16> {
  using packed_type = bf16_2;
};
template <>
struct packing<half> {
  using packed_type = half_2;
};

template <class To, class From>
struct convertor {
  static To convert(const From& x) {
    To result;
    emulated::set(result.x, emulated::value(x.x));
    emulated::set(result.y, emulated::value(x.y));
    return result;
  }
};

}  // namespace base_types

}  // namespace kittens

// As cuda_bf16.h and cuda_fp16.h name them.
inline kittens::bf16_2 __float22bfloat162_rn(float2 x) {
  return kittens::base_types::convertor<kittens::bf16_2, float2>::convert(x);
}
inline kittens::half_2 __float22half2_rn(float2 x) {
  return kittens::base_types::convertor<kittens::half_2, float2>::convert(x);
}
inline float2 __bfloat1622float2(kittens::bf16_2 x) {
  return kittens::base_types::convertor<float2, kittens::bf16_2>::convert(x);
}
inline float2 __half22float2(kittens::half_2 x) {
  return kittens::base_types::convertor<float2, kittens::half_2>::convert(x);
}

namespace kittens {

// A warp's 16 rows of a tile in registers, row layout: of tile j, data[k] of lane l is row
// l / 4 + 8 (k % 2), columns 16 j + 8 (k / 2) + 2 (l % 4) + {0, 1}.
template <class T_, int kRows, int kCols>
struct rt {
  static_assert(kRows == 16);
  using T = T_;
  using Pair = typename base_types::packing<T>::packed_type;
  static constexpr int rows = kRows, cols = kCols, width = kCols / 16, height = 1;
  struct Base {
    Pair data[4];
  };
  Base tiles[1][width];
};

template <int kRows, int kCols>
using rt_fl = rt<float, kRows, kCols>;

// A tile in shared memory: panels of 64 columns, rows of 128 bytes in the 128-byte swizzle.
template <class T_, int kRows, int kCols>
struct alignas(128) st {
  static_assert(sizeof(T_) == 2 && kCols % 64 == 0);
  using T = T_;
  static constexpr int rows = kRows, cols = kCols;
  T data[kRows * kCols];

  T& at(int row, int column) {
    char* panel = reinterpret_cast<char*>(data) + column / 64 * kRows * 128;
    return *reinterpret_cast<T*>(panel + row * 128 + ((column % 64 * 2) ^ (row % 8 << 4)));
  }
  const T& at(int row, int column) const { return const_cast<st*>(this)->at(row, column); }
  const T& operator[](int2 place) const { return at(place.x, place.y); }
};

namespace emulated {

inline int row_of(int lane, int k) { return lane / 32 * 16 + lane % 32 / 4 + k % 2 * 8; }
inline int column_of(int lane, int j, int k) { return 16 * j + 8 * (k / 2) + 2 * (lane % 4); }

// Hands every element of the registers of a warpgroup to use(element, row, column).
template <class Tile, class Use>
void each_element(Tile* const* lanes, Use use) {
  for (int l = 0; l < kWarpgroup; ++l) {
    for (int j = 0; j < Tile::width; ++j) {
      for (int k = 0; k < 4; ++k) {
        auto& pair = lanes[l]->tiles[0][j].data[k];
        use(pair.x, row_of(l, k), column_of(l, j, k));
        use(pair.y, row_of(l, k), column_of(l, j, k) + 1);
      }
    }
  }
}

template <class T, int kRows, int kCols>
void check_tile(const st<T, kRows, kCols>& tile) {
  Block::current().check_shared(&tile, 128);
  if (Block::current().shared_offset(&tile) % 1024 != 0) {
    Block::current().fail("a tile that does not start at a multiple of 1024 bytes");
  }
}

// Which operands of a product are given as their transposes.
enum class Form { kAB, kABt, kAtB };

// The left operand of a product: 64 rows in the registers of a warpgroup, or a tile.
template <Form kForm, class T, int kCols, int kDepth>
void read_left(rt<T, 16, kCols>* const* lanes, float (*to)[kDepth]) {
  static_assert(kForm != Form::kAtB);
  each_element(lanes, [&](T x, int row, int column) { to[row][column] = value(x); });
}
template <Form kForm, class T, int kRows, int kCols, int kDepth>
void read_left(st<T, kRows, kCols>* const* lanes, float (*to)[kDepth]) {
  static_assert((kForm == Form::kAtB ? kCols : kRows) == 64);
  check_tile(*lanes[0]);
  for (int i = 0; i < 64; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      to[i][k] = value(kForm == Form::kAtB ? lanes[0]->at(k, i) : lanes[0]->at(i, k));
    }
  }
}

// d = a b, or d += a b.
template <Form kForm, bool kAdds, class D, class A, class B>
void product(D* const* d, A* const* a, const B& b) {
  constexpr bool kTransposed = kForm == Form::kABt;
  constexpr int kDepth = kForm == Form::kAtB ? A::rows : A::cols;
  constexpr int kColumns = kTransposed ? B::rows : B::cols;
  static_assert(D::cols == kColumns && (kTransposed ? B::cols : B::rows) == kDepth);
  check_tile(b);
  static thread_local float left[64][kDepth], right[kDepth][kColumns], sums[64][kColumns];
  read_left<kForm>(a, left);
  for (int k = 0; k < kDepth; ++k) {
    for (int j = 0; j < kColumns; ++j) right[k][j] = value(kTransposed ? b.at(j, k) : b.at(k, j));
  }
  for (int i = 0; i < 64; ++i) {
    std::fill(sums[i], sums[i] + kColumns, 0.0f);
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < kColumns; ++j) sums[i][j] += left[i][k] * right[k][j];
    }
  }
  each_element(d,
               [&](float& x, int row, int column) { x = (kAdds ? x : 0.0f) + sums[row][column]; });
}

template <Form kForm, bool kAdds, class D, class A, class B>
void start(D& d, const A& a, const B& b) {
  struct Argument {
    D* d;
    A* a;
    const B* b;
  } mine{&d, const_cast<A*>(&a), &b};
  Block::current().together<kWarpgroup>("wgmma", mine, [](Argument* const* lanes) {
    std::vector<D*> results;
    std::vector<A*> lefts;
    const B* right = lanes[0]->b;
    for (int l = 0; l < kWarpgroup; ++l) {
      results.push_back(lanes[l]->d);
      lefts.push_back(lanes[l]->a);
      if (lanes[l]->b != right) Block::current().fail("threads give different operands");
    }
    if (!options.late_copies) {
      product<kForm, kAdds>(results.data(), lefts.data(), *right);
      return;
    }
    if constexpr (!kAdds) {  // nobody may read the result before it is there
      each_element(results.data(), [](float& x, int, int) { x = NAN; });
    }
    warpgroup_state().started.push_back(
        [results, lefts, right] { product<kForm, kAdds>(results.data(), lefts.data(), *right); });
  });
  wgmma_commit();
}

}  // namespace emulated

template <int kWarps>
struct group {
  template <class Tile>
  static void zero(Tile& tile) {
    for (auto& base : tile.tiles[0]) {
      for (auto& pair : base.data) pair = {};
    }
  }
  template <class To, class From>
  static void copy(To& to, const From& from) {
    using Convertor = base_types::convertor<typename To::Pair, typename From::Pair>;
    for (int j = 0; j < To::width; ++j) {
      for (int k = 0; k < 4; ++k) {
        to.tiles[0][j].data[k] = Convertor::convert(from.tiles[0][j].data[k]);
      }
    }
  }
  template <class D, class A, class B, int kFence = 1, int kAccumulate = 1>
  static void mma_ABt(D& d, const A& a, const B& b) {
    emulated::start<emulated::Form::kABt, kAccumulate != 0>(d, a, b);
  }
  template <class D, class A, class B, int kFence = 1, int kAccumulate = 1>
  static void mma_AB(D& d, const A& a, const B& b) {
    emulated::start<emulated::Form::kAB, kAccumulate != 0>(d, a, b);
  }
  template <class D, class A, class B, int kFence = 1, int kAccumulate = 1>
  static void mma_AtB(D& d, const A& a, const B& b) {
    emulated::start<emulated::Form::kAtB, kAccumulate != 0>(d, a, b);
  }
  template <int kLeft = 0>
  static void mma_async_wait() {
    emulated::wgmma_wait<kLeft>();
  }

  // Between a warpgroup's tile and its registers: every thread moves what is its own.
  template <class Shared, class Registers>
  static void store(Shared& to, const Registers& from) {
    static_assert(kWarps == 4 && Shared::rows == 64 && Shared::cols == Registers::cols);
    emulated::check_tile(to);
    const int lane = threadIdx.x % 128;
    for (int j = 0; j < Registers::width; ++j) {
      for (int k = 0; k < 4; ++k) {
        const auto& pair = from.tiles[0][j].data[k];
        const int row = emulated::row_of(lane, k), column = emulated::column_of(lane, j, k);
        emulated::set(to.at(row, column), emulated::value(pair.x));
        emulated::set(to.at(row, column + 1), emulated::value(pair.y));
      }
    }
  }
  template <class Registers, class Shared>
  static void load(Registers& to, const Shared& from) {
    static_assert(kWarps == 4 && Shared::rows == 64 && Shared::cols == Registers::cols);
    emulated::check_tile(from);
    const int lane = threadIdx.x % 128;
    for (int j = 0; j < Registers::width; ++j) {
      for (int k = 0; k < 4; ++k) {
        auto& pair = to.tiles[0][j].data[k];
        const int row = emulated::row_of(lane, k), column = emulated::column_of(lane, j, k);
        emulated::set(pair.x, emulated::value(from.at(row, column)));
        emulated::set(pair.y, emulated::value(from.at(row, column + 1)));
      }
    }
  }
};

using warp = group<1>;
using warpgroup = group<4>;

}  // namespace kittens
