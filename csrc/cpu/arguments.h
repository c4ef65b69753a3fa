// What a kernel is given: tensors as pointers and strides, the shape of the problem, the lists.
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

namespace video_attn::cpu {

// Lanes and rows that one step of a kernel works on. A block of the mask is cut into tiles of this
// size; smaller blocks are one tile.
constexpr int64_t kTile = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A [B, H, S, D] tensor read or written in place; strides in elements, the last one is 1.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  template <typename T>
  T* at(int64_t batch, int64_t head, int64_t row) const {
    return static_cast<T*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// An fp32 [B, H, S] tensor with one number per query row.
struct RowScalars {
  float* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;

  float& at(int64_t batch, int64_t head, int64_t row) const {
    return data[batch * batch_stride + head * head_stride + row * row_stride];
  }
};

// Valid tokens of each block of one side, [B|1, N]; without data every block is full.
struct BlockLens {
  const int32_t* data = nullptr;
  int64_t batch_stride = 0, block_stride = 0;
  int64_t block_size = 0, length = 0;  // tokens per block, tokens of the sequence

  int64_t blocks() const { return ceil_div(length, block_size); }

  // The sequence's end is an end too, whatever the data says.
  int64_t at(int64_t batch, int64_t block) const {
    const int64_t room = std::min(block_size, length - block * block_size);
    if (data == nullptr) return room;
    return std::clamp<int64_t>(data[batch * batch_stride + block * block_stride], 0, room);
  }
};

// One block's list: stored indices, or a range for dense attention.
struct ListRow {
  const int32_t* indices = nullptr;
  int64_t stride = 0, first = 0, count = 0;

  int64_t operator[](int64_t n) const { return indices ? indices[n * stride] : first + n; }
};

// Lists [B|1, H|1, N] of counts and [B|1, H|1, N, K] of indices; dimensions of size 1 have stride
// 0.
struct BlockLists {
  const int32_t* counts = nullptr;
  const int32_t* indices = nullptr;
  int64_t count_strides[3] = {0, 0, 0};
  int64_t index_strides[4] = {0, 0, 0, 0};

  ListRow row(int64_t batch, int64_t head, int64_t block) const {
    const int64_t* s = index_strides;
    const int64_t* c = count_strides;
    return {indices + batch * s[0] + head * s[1] + block * s[2], s[3], 0,
            counts[batch * c[0] + head * c[1] + block * c[2]]};
  }
};

struct Geometry {
  int64_t batch, q_heads, kv_heads;
  int64_t head_dim, value_dim;
  BlockLens q, kv;   // for dense attention: full blocks of kTile
  BlockLists lists;  // key blocks of each query block (forward), or the transpose (backward)
  bool is_dense, is_causal;
  float scale;
  c10::ScalarType dtype;
  bool bf16_products;  // bf16 operands go into the matrix kernel as they are, else as fp32
  bool int8_products;  // and so do 8-bit integers

  int64_t group() const { return q_heads / kv_heads; }

  // Causal attention is aligned at the bottom right: query i sees keys up to i + offset.
  int64_t causal_offset() const { return kv.length - q.length; }

  ListRow keys_of(int64_t batch, int64_t head, int64_t q_block) const {
    if (!is_dense) return lists.row(batch, head, q_block);
    int64_t seen = kv.length;
    if (is_causal) {
      const int64_t last = std::min((q_block + 1) * q.block_size, q.length) - 1;
      seen = std::clamp<int64_t>(last + causal_offset() + 1, 0, kv.length);
    }
    return {nullptr, 0, 0, ceil_div(seen, kv.block_size)};
  }

  ListRow queries_of(int64_t batch, int64_t head, int64_t kv_block) const {
    if (!is_dense) return lists.row(batch, head, kv_block);
    int64_t first = 0;
    if (is_causal) first = std::max<int64_t>(kv_block * kv.block_size - causal_offset(), 0);
    first = std::min(first / q.block_size, q.blocks());
    return {nullptr, 0, first, q.blocks() - first};
  }
};

struct ForwardArguments {
  Geometry geometry;
  Rows q, k, v, out;
  RowScalars lse;
};

// Tokens that share a scale; python/video_attn/quantize.py defines them.
enum class Granularity { kPerHead, kPerBlock, kPerWarp, kPerThread };

// A quantized precision with its options.
struct Recipe {
  bool fp8_scores;  // q and k become FP8 codes, else INT8
  bool fp8_values;  // v and the weights become FP8, else fp16
  Granularity granularity;
  bool smooth_k, smooth_q, hadamard, smooth_v;
};

struct QuantizedArguments {
  ForwardArguments forward;
  Recipe recipe;
};

struct BackwardArguments {
  Geometry geometry;
  Rows grad_out, q, k, v, out, dq, dk, dv;
  RowScalars lse, grad_lse;  // grad_lse may have no data
};

}  // namespace video_attn::cpu
