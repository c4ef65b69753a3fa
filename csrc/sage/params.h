// What a launch of the Sage kernels is given: plain structs, read by bindings, launchers, kernels
// and the host emulation alike. Sizes and offsets that grow with the sequence are 64-bit.
#pragma once

#include <cstdint>

#include "device/block_lists.h"

namespace video_attn::sage {

inline constexpr int kTile = 64;  // tokens: one step over the keys, and the unit of the scales

constexpr int tiles_in(int length) { return (length + kTile - 1) / kTile; }

enum class Element : int32_t { kFloat16, kBFloat16, kFloat32 };

// Codes of Q and K, and of V.
enum class QkCode : int32_t { kInt8, kFp8 };
enum class VCode : int32_t { kFloat16, kFp8 };

// A [batch, heads, tokens, channels] tensor; the stride of the channels is 1.
struct Tensor4 {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;  // in elements
  Element dtype;
};

struct QuantizeParams {
  Tensor4 q, k, v;
  const int32_t* places;  // where token i of both sides lies in q, k and v; null: at i
  Side q_side, kv_side;   // block sizes: multiples of kTile; dense attention has one block
  int32_t batch, heads, kv_heads, head_dim, head_dim_v;
  int32_t padded_dim;  // of the codes: 64 or 128
  float scale;         // of the scores, for lse_shift

  QkCode qk_code;
  VCode v_code;
  float v_limit;               // what the largest value of a channel of V is scaled to
  int32_t q_groups, k_groups;  // scales per tile: 1, 4 or 32; 1 or 4
  bool smooth_k, smooth_v;
  int32_t rotation;  // channels of Q and K that a Hadamard matrix turns; 0: it is not asked for

  // Results. Codes are tiles in the order of shared memory (tiles.h), filled up with zeros.
  uint8_t *q_codes, *k_codes, *v_codes;
  float *q_scale, *k_scale;  // [batch, heads, tiles * groups]
  float *v_scale, *v_mean;   // [batch, kv_heads, padded_dim]; v_mean is null without smooth_v
  float* lse_shift;          // [batch, heads, q_length]; null without smooth_k
  float* score_shift;        // [batch, heads, query tiles, key tiles * 64]; null without smooth_q

  float* workspace;  // statistics_size(params) floats
};

struct AttentionParams {
  const uint8_t *q_codes, *k_codes, *v_codes;
  const float *q_scale, *k_scale, *v_scale, *v_mean, *lse_shift, *score_shift;
  Side q_side, kv_side;
  int32_t batch, heads, kv_heads, head_dim_v, padded_dim;
  int32_t q_groups, k_groups;
  float scale_log2;  // scale of the scores times log2(e)
  bool is_causal;    // dense only; the last query sees every key
  BlockLists lists;

  QkCode qk_code;
  VCode v_code;
  bool half_sums;  // P V of a tile summed in fp16

  void* out;  // [batch, heads, tokens, head_dim_v], channel stride 1
  int64_t out_batch_stride, out_head_stride, out_token_stride;
  Element out_dtype;
  const int32_t* places;  // where query i lies in out, -1: nowhere; null: at i
  float* lse;             // [batch, heads, q_length]
};

}  // namespace video_attn::sage
