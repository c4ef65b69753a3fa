// The operators of the Sage kernels: from tensors to parameters, with every check that keeps a
// kernel inside its tensors. Schemas: backends/cuda_sage.py.
//
// A Context stands for the place of execution: made from a tensor, it has made the tensor's device
// current, and knows `capability` and `stream`.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "sage/launch.h"

namespace video_attn::sage {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `sizes`: what each dimension must have.
template <class Sizes = std::initializer_list<int64_t>>
void check_tensor(const char* name, const Tensor& x, const Tensor& like, ScalarType dtype,
                  const Sizes& sizes) {
  STD_TORCH_CHECK(x.device() == like.device(), name, " is on another device than the first tensor");
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(sizes.size()), name, " has ", x.dim(),
                  " dimensions, expected ", sizes.size());
  int i = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(x.size(i) == size, name, " has size ", x.size(i), " in dimension ", i,
                    ", expected ", size);
    ++i;
  }
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

inline Element element_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Float:
      return Element::kFloat32;
    default:
      STD_TORCH_CHECK(false, name, " must be float16, bfloat16 or float32");
  }
}

inline Tensor4 tensor4(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.device() == like.device(), name, " is on another device than the first tensor");
  STD_TORCH_CHECK(x.dim() == 4, name, " must have 4 dimensions, has ", x.dim());
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, name, " must have stride 1 on its channels");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), element_of(name, x)};
}

inline int32_t small(const char* name, int64_t value, int64_t limit = 0x7FFFFF00) {
  STD_TORCH_CHECK(value >= 1 && value <= limit, name, " is ", value, ", allowed: 1 to ", limit);
  return static_cast<int32_t>(value);
}

// A stride by which a dimension of size 1 stands for all.
inline int64_t broadcast_stride(const Tensor& x, int64_t dim) {
  return x.size(dim) == 1 ? 0 : x.stride(dim);
}

inline Side make_side(const char* name, int64_t length, int64_t block_size,
                      const OptionalTensor& lens, int64_t batch, const Tensor& like) {
  Side side{small("sequence length", length), 0, {nullptr, 0}};
  // 0 stands for dense attention: one block that holds everything.
  side.block_size =
      block_size == 0 ? tiles_in(side.length) * kTile : small("block size", block_size);
  STD_TORCH_CHECK(side.block_size % kTile == 0, name, " block size ", block_size,
                  " is not a multiple of ", kTile);
  if (lens) {
    const int64_t blocks = (length + side.block_size - 1) / side.block_size;
    check_tensor(name, *lens, like, ScalarType::Int, {lens->size(0), blocks});
    STD_TORCH_CHECK(lens->size(0) == 1 || lens->size(0) == batch, name, " lens has batch ",
                    lens->size(0));
    side.lens = {static_cast<const int32_t*>(lens->data_ptr()), broadcast_stride(*lens, 0)};
  }
  return side;
}

inline BlockLists make_lists(const OptionalTensor& counts, const OptionalTensor& indices,
                             const Side& q_side, int64_t batch, int64_t heads, const Tensor& like) {
  if (!counts) return {};
  STD_TORCH_CHECK(indices.has_value(), "kv_num_blocks without kv_indices");
  STD_TORCH_CHECK(counts->dim() == 3 && indices->dim() == 4,
                  "kv_num_blocks must have 3 dimensions, "
                  "kv_indices 4");
  const int64_t rows = (q_side.length + q_side.block_size - 1) / q_side.block_size;
  for (const Tensor* x : {&*counts, &*indices}) {
    STD_TORCH_CHECK(x->device() == like.device() && x->scalar_type() == ScalarType::Int,
                    "block lists must be int32, on the device of the codes");
    STD_TORCH_CHECK((x->size(0) == 1 || x->size(0) == batch) &&
                        (x->size(1) == 1 || x->size(1) == heads) && x->size(2) == rows,
                    "block lists must be [batch or 1, heads or 1, ", rows, " query blocks]");
  }
  return {static_cast<const int32_t*>(counts->data_ptr()),
          static_cast<const int32_t*>(indices->data_ptr()),
          small("longest list", indices->size(3)),
          broadcast_stride(*counts, 0),
          broadcast_stride(*counts, 1),
          counts->stride(2),
          broadcast_stride(*indices, 0),
          broadcast_stride(*indices, 1),
          indices->stride(2),
          indices->stride(3)};
}

inline QkCode qk_code_of(const Tensor& codes) {
  const bool is_int8 = codes.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(is_int8 || codes.scalar_type() == ScalarType::Float8_e4m3fn,
                  "codes of Q and K must be int8 or float8_e4m3fn");
  return is_int8 ? QkCode::kInt8 : QkCode::kFp8;
}

inline VCode v_code_of(const Tensor& codes) {
  const bool is_half = codes.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(is_half || codes.scalar_type() == ScalarType::Float8_e4m3fn,
                  "codes of V must be float16 or float8_e4m3fn");
  return is_half ? VCode::kFloat16 : VCode::kFp8;
}

template <class T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class T>
T* data_of(const OptionalTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

// The codes and scales of a call, the same for both operators.
struct Codes {
  Tensor q, k, v, q_scale, k_scale, v_scale;
  OptionalTensor v_mean, lse_shift, score_shift;

  // Checks them against the sizes and sides of `p`, and puts them there.
  template <class Params>
  void put_into(Params& p) const {
    check(p.batch, p.heads, p.kv_heads, p.q_side, p.kv_side, p.padded_dim);
    p.q_codes = data_of<uint8_t>(q);
    p.k_codes = data_of<uint8_t>(k);
    p.v_codes = data_of<uint8_t>(v);
    p.q_scale = data_of<float>(q_scale);
    p.k_scale = data_of<float>(k_scale);
    p.v_scale = data_of<float>(v_scale);
    p.v_mean = data_of<float>(v_mean);
    p.lse_shift = data_of<float>(lse_shift);
    p.score_shift = data_of<float>(score_shift);
    p.qk_code = qk_code_of(q);
    p.v_code = v_code_of(v);
    p.q_groups = static_cast<int32_t>(q_scale.size(3));
    p.k_groups = static_cast<int32_t>(k_scale.size(3));
  }

 private:
  void check(int64_t batch, int64_t heads, int64_t kv_heads, const Side& q_side,
             const Side& kv_side, int64_t dim) const {
    const int64_t q_tiles = tiles_in(q_side.length), kv_tiles = tiles_in(kv_side.length);
    STD_TORCH_CHECK(dim == 64 || dim == 128, "codes have ", dim, " channels, allowed: 64 and 128");
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "heads ", heads,
                    " is not a multiple of kv heads ", kv_heads);
    STD_TORCH_CHECK(heads <= 65535 && batch <= 32767, "more than 65535 heads or 32767 batches");
    const bool by_channel = v_code_of(v) == VCode::kFp8;
    STD_TORCH_CHECK(by_channel || qk_code_of(q) == QkCode::kInt8, "FP8 Q and K go with FP8 V");
    check_tensor("q_codes", q, q, q.scalar_type(), {batch, heads, q_tiles, kTile, dim});
    check_tensor("k_codes", k, q, q.scalar_type(), {batch, kv_heads, kv_tiles, kTile, dim});
    check_tensor("v_codes", v, q, v.scalar_type(),
                 {batch, kv_heads, kv_tiles, by_channel ? dim : kTile, by_channel ? kTile : dim});
    const int64_t q_groups = q_scale.size(3), k_groups = k_scale.size(3);
    STD_TORCH_CHECK(q_groups == 1 || q_groups == 4 || q_groups == 32, "q_scale has ", q_groups,
                    " groups per tile, allowed: 1, 4, 32");
    STD_TORCH_CHECK(k_groups == 1 || k_groups == 4, "k_scale has ", k_groups,
                    " groups per tile, allowed: 1, 4");
    check_numbers("q_scale", q_scale, {batch, heads, q_tiles, q_groups});
    check_numbers("k_scale", k_scale, {batch, kv_heads, kv_tiles, k_groups});
    check_numbers("v_scale", v_scale, {batch, kv_heads, dim});
    if (v_mean) check_numbers("v_mean", *v_mean, {batch, kv_heads, dim});
    if (lse_shift) check_numbers("lse_shift", *lse_shift, {batch, heads, q_side.length});
    if (score_shift) {
      check_numbers("score_shift", *score_shift, {batch, heads, q_tiles, kv_tiles * kTile});
    }
  }

  void check_numbers(const char* name, const Tensor& x,
                     std::initializer_list<int64_t> sizes) const {
    check_tensor(name, x, q, ScalarType::Float, sizes);
  }
};

// Where the tokens of a mask's order lie: their number and the table, or `tokens` and null.
struct Places {
  int64_t length;
  const int32_t* data;
};

inline Places places_of(const OptionalTensor& places, int64_t tokens, const Tensor& like) {
  if (!places) return {tokens, nullptr};
  check_tensor("places", *places, like, ScalarType::Int, {places->size(0)});
  return {places->size(0), static_cast<const int32_t*>(places->data_ptr())};
}

template <class Context>
void quantize(Tensor q, Tensor k, Tensor v, OptionalTensor places, OptionalTensor q_lens,
              OptionalTensor kv_lens, int64_t q_block_size, int64_t kv_block_size, double scale,
              double v_limit, bool hadamard, Tensor q_codes, Tensor k_codes, Tensor v_codes,
              Tensor q_scale, Tensor k_scale, Tensor v_scale, OptionalTensor v_mean,
              OptionalTensor lse_shift, OptionalTensor score_shift, Tensor workspace) {
  QuantizeParams p{};
  p.q = tensor4("q", q, q);
  p.k = tensor4("k", k, q);
  p.v = tensor4("v", v, q);
  const int64_t batch = q.size(0);
  STD_TORCH_CHECK(!places || k.size(2) == q.size(2), "places of q and k that differ in length");
  const Places q_places = places_of(places, q.size(2), q);
  p.places = q_places.data;
  p.q_side = make_side("q", q_places.length, q_block_size, q_lens, batch, q);
  p.kv_side =
      make_side("kv", places_of(places, k.size(2), q).length, kv_block_size, kv_lens, batch, q);
  p.batch = small("batch", batch);
  p.heads = small("heads", q.size(1));
  p.kv_heads = small("kv heads", k.size(1));
  p.head_dim = small("head_dim", q.size(3), kMaxHeadDim);
  p.head_dim_v = small("head_dim of v", v.size(3), kMaxHeadDim);
  STD_TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && k.size(3) == q.size(3) &&
                      v.size(1) == k.size(1) && v.size(2) == k.size(2),
                  "the shapes of q, k and v do not fit together");
  p.padded_dim = small("padded dim", q_codes.size(4), kMaxHeadDim);
  STD_TORCH_CHECK(p.padded_dim >= p.head_dim && p.padded_dim >= p.head_dim_v,
                  "codes have fewer channels than q or v");
  const Codes codes{q_codes, k_codes, v_codes,   q_scale,    k_scale,
                    v_scale, v_mean,  lse_shift, score_shift};
  codes.put_into(p);
  check_tensor("workspace", workspace, q, ScalarType::Float, {workspace_size(p)});
  STD_TORCH_CHECK(!hadamard || p.head_dim % 16 == 0,
                  "hadamard needs a head_dim that is a multiple ", "of 16, got ", p.head_dim);
  p.rotation = hadamard ? p.head_dim & -p.head_dim : 0;  // the largest power of two in it
  p.scale = static_cast<float>(scale);
  p.v_limit = static_cast<float>(v_limit);
  p.smooth_k = lse_shift.has_value();
  p.smooth_v = v_mean.has_value();
  p.workspace = data_of<float>(workspace);
  const Context context(q);
  const char* error = launch_quantize(p, context.capability, context.stream);
  STD_TORCH_CHECK(error == nullptr, "sage_quantize: ", error ? error : "");
}

template <class Context>
void attention(Tensor q_codes, Tensor k_codes, Tensor v_codes, Tensor q_scale, Tensor k_scale,
               Tensor v_scale, OptionalTensor v_mean, OptionalTensor lse_shift,
               OptionalTensor score_shift, OptionalTensor kv_num_blocks, OptionalTensor kv_indices,
               OptionalTensor q_lens, OptionalTensor kv_lens, int64_t q_block_size,
               int64_t kv_block_size, int64_t kv_len, double scale, bool is_causal, bool half_sums,
               OptionalTensor places, Tensor out, Tensor lse) {
  AttentionParams p{};
  STD_TORCH_CHECK(q_codes.dim() == 5, "q_codes must have 5 dimensions");
  const int64_t batch = q_codes.size(0);
  const Tensor4 result = tensor4("out", out, q_codes);
  const Places out_places = places_of(places, out.size(2), q_codes);
  p.places = out_places.data;
  p.q_side = make_side("q", out_places.length, q_block_size, q_lens, batch, q_codes);
  p.kv_side = make_side("kv", kv_len, kv_block_size, kv_lens, batch, q_codes);
  p.batch = small("batch", batch);
  p.heads = small("heads", q_codes.size(1));
  p.kv_heads = small("kv heads", k_codes.size(1));
  p.padded_dim = small("padded dim", q_codes.size(4), kMaxHeadDim);
  p.head_dim_v = small("head_dim of v", out.size(3), p.padded_dim);
  const Codes codes{q_codes, k_codes, v_codes,   q_scale,    k_scale,
                    v_scale, v_mean,  lse_shift, score_shift};
  codes.put_into(p);
  STD_TORCH_CHECK(out.size(0) == batch && out.size(1) == p.heads,
                  "out must be [batch, heads, ...]");
  check_tensor("lse", lse, q_codes, ScalarType::Float, {batch, p.heads, p.q_side.length});
  p.lists = make_lists(kv_num_blocks, kv_indices, p.q_side, batch, p.heads, q_codes);
  STD_TORCH_CHECK(!is_causal || !kv_num_blocks, "is_causal is for dense attention");
  p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  p.is_causal = is_causal;
  p.half_sums = half_sums;
  p.out = out.data_ptr();
  p.out_batch_stride = result.batch_stride;
  p.out_head_stride = result.head_stride;
  p.out_token_stride = result.token_stride;
  p.out_dtype = result.dtype;
  p.lse = data_of<float>(lse);
  const Context context(q_codes);
  const char* error = launch_attention(p, context.capability, context.stream);
  STD_TORCH_CHECK(error == nullptr, "sage_attention: ", error ? error : "");
}

}  // namespace video_attn::sage
