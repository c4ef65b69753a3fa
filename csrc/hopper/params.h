// What a launch of the Hopper kernels is given: plain structs, read by bindings, launchers, kernels
// and the host planning alike. No torch, no ThunderKittens. Offsets are 64-bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/block_lists.h"

namespace video_attn::hopper {

enum class Element : int32_t { kFloat16, kBFloat16 };

// A [batch, heads, tokens, channels] tensor: channel stride 1; the address and the other strides
// are multiples of 16 bytes, as the tensor memory accelerator needs.
struct Tensor4 {
  void* data;
  int64_t batch_stride, head_stride, token_stride;  // in elements
};

struct Problem {
  int32_t batch, heads, kv_heads;
  int32_t head_dim;  // of q, k and v: at most 128, a multiple of 8
  Element element;
  Side q_side, kv_side;
  float scale;  // of the scores
};

struct ForwardParams {
  Problem problem;
  BlockLists lists;  // the key blocks of each query block
  Tensor4 q, k, v;
  Tensor4 out;
  float* lse;  // natural log, [batch, heads, q length], contiguous
};

struct BackwardParams {
  Problem problem;
  BlockLists lists;       // the key blocks of each query block
  BlockLists transposed;  // the query blocks of each key block
  Tensor4 q, k, v, out, grad_out;
  const float* lse;       // [batch, heads, q length], contiguous
  const float* grad_lse;  // the same shape; null when the lse has no gradient
  Tensor4 dq, dk, dv;
  bool deterministic;  // bitwise the same gradients in every run
};

}  // namespace video_attn::hopper
