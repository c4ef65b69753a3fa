// The operators of this component: arguments to plain structs, checks, the call. Schemas stand in
// python/video_attn/backends/cpu.py and cpu_quantized.py; outputs are allocated there.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string_view>

#include "cpu/checks.h"
#include "cpu/dispatch.h"

namespace video_attn::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// A stride that stays where it is in a dimension that is broadcast.
int64_t broadcast_stride(const at::Tensor& x, int64_t dim) {
  return x.size(dim) == 1 ? 0 : x.stride(dim);
}

Rows rows_of(const at::Tensor& x) {
  // Inputs are only read: a lazy copy must not be made real.
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

Rows rows_of(at::Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

RowScalars scalars_of(const at::Tensor& x) {
  return {const_cast<float*>(x.const_data_ptr<float>()), x.stride(0), x.stride(1), x.stride(2)};
}

RowScalars scalars_of(at::Tensor& x) {
  return {x.mutable_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)};
}

BlockLists lists_of(const at::Tensor& counts, const at::Tensor& indices) {
  BlockLists lists{counts.const_data_ptr<int32_t>(), indices.const_data_ptr<int32_t>()};
  for (int64_t d = 0; d < 2; ++d) {
    lists.count_strides[d] = broadcast_stride(counts, d);
    lists.index_strides[d] = broadcast_stride(indices, d);
  }
  lists.count_strides[2] = counts.stride(2);
  lists.index_strides[2] = indices.stride(2);
  lists.index_strides[3] = indices.stride(3);
  return lists;
}

BlockLens lens_of(const OptionalTensor& lens, int64_t block_size, int64_t length) {
  BlockLens result{nullptr, 0, 0, block_size, length};
  if (lens) {
    result.data = lens->const_data_ptr<int32_t>();
    result.batch_stride = broadcast_stride(*lens, 0);
    result.block_stride = lens->stride(1);
  }
  return result;
}

Geometry geometry_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const OptionalTensor& counts, const OptionalTensor& indices,
                     const OptionalTensor& q_lens, const OptionalTensor& kv_lens,
                     int64_t q_block_size, int64_t kv_block_size, double scale, bool is_causal) {
  Geometry g{};
  g.batch = q.size(0);
  g.q_heads = q.size(1);
  g.kv_heads = k.size(1);
  g.head_dim = q.size(3);
  g.value_dim = v.size(3);
  g.is_dense = !counts;
  g.is_causal = is_causal;
  // A scale outside of fp32 would become 0 or inf, and those times a score NaN.
  g.scale = static_cast<float>(std::clamp<double>(scale, std::numeric_limits<float>::min(), 1e38));
  g.dtype = q.scalar_type();
  g.bf16_products = bf16_products();
  g.int8_products = int8_products();
  if (g.is_dense) q_block_size = kv_block_size = kTile;
  g.q = lens_of(q_lens, q_block_size, q.size(2));
  g.kv = lens_of(kv_lens, kv_block_size, k.size(2));
  if (counts) g.lists = lists_of(*counts, *indices);
  return g;
}

ForwardArguments forward_arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const OptionalTensor& kv_num_blocks,
                                   const OptionalTensor& kv_indices,
                                   const OptionalTensor& q_block_lens,
                                   const OptionalTensor& kv_block_lens, int64_t q_block_size,
                                   int64_t kv_block_size, double scale, bool is_causal,
                                   at::Tensor& out, at::Tensor& lse) {
  check_inputs(q, k, v);
  check_rows("out", out, q, v.size(3));
  check_scalars("lse", lse, q);
  check_mask(q, k, "kv", kv_num_blocks, kv_indices, q_block_lens, kv_block_lens, q_block_size,
             kv_block_size, is_causal);
  const Geometry g = geometry_of(q, k, v, kv_num_blocks, kv_indices, q_block_lens, kv_block_lens,
                                 q_block_size, kv_block_size, scale, is_causal);
  if (kv_num_blocks) check_lists("kv", g.lists, *kv_num_blocks, *kv_indices, g.kv.blocks());
  return {g, rows_of(q), rows_of(k), rows_of(v), rows_of(out), scalars_of(lse)};
}

void attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const OptionalTensor& kv_num_blocks, const OptionalTensor& kv_indices,
                       const OptionalTensor& q_block_lens, const OptionalTensor& kv_block_lens,
                       int64_t q_block_size, int64_t kv_block_size, double scale, bool is_causal,
                       at::Tensor& out, at::Tensor& lse) {
  kernels().forward(forward_arguments(q, k, v, kv_num_blocks, kv_indices, q_block_lens,
                                      kv_block_lens, q_block_size, kv_block_size, scale, is_causal,
                                      out, lse));
}

Granularity granularity_of(std::string_view name) {
  if (name == "per_head") return Granularity::kPerHead;
  if (name == "per_block") return Granularity::kPerBlock;
  if (name == "per_warp") return Granularity::kPerWarp;
  TORCH_CHECK_VALUE(name == "per_thread",
                    "granularity must be per_head, per_block, per_warp or per_thread, got ", name);
  return Granularity::kPerThread;
}

void quantized_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const OptionalTensor& kv_num_blocks, const OptionalTensor& kv_indices,
                       const OptionalTensor& q_block_lens, const OptionalTensor& kv_block_lens,
                       int64_t q_block_size, int64_t kv_block_size, double scale, bool is_causal,
                       std::string_view precision, std::string_view granularity, bool smooth_k,
                       bool smooth_q, bool hadamard, bool smooth_v, at::Tensor& out,
                       at::Tensor& lse) {
  TORCH_CHECK_VALUE(precision == "sage_fp16" || precision == "sage_fp8" || precision == "fp8",
                    "precision must be sage_fp16, sage_fp8 or fp8, got ", precision);
  const Recipe recipe{precision == "fp8",
                      precision != "sage_fp16",
                      granularity_of(granularity),
                      smooth_k,
                      smooth_q,
                      hadamard,
                      smooth_v};
  kernels().quantized_forward(
      {forward_arguments(q, k, v, kv_num_blocks, kv_indices, q_block_lens, kv_block_lens,
                         q_block_size, kv_block_size, scale, is_causal, out, lse),
       recipe});
}

void attention_backward(const at::Tensor& grad_out, const OptionalTensor& grad_lse,
                        const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& out, const at::Tensor& lse,
                        const OptionalTensor& q_num_blocks, const OptionalTensor& q_indices,
                        const OptionalTensor& q_block_lens, const OptionalTensor& kv_block_lens,
                        int64_t q_block_size, int64_t kv_block_size, double scale, bool is_causal,
                        at::Tensor& dq, at::Tensor& dk, at::Tensor& dv) {
  check_inputs(q, k, v);
  check_rows("grad_out", grad_out, q, v.size(3));
  check_rows("out", out, q, v.size(3));
  check_rows("dq", dq, q, q.size(3));
  check_rows("dk", dk, k, k.size(3));
  check_rows("dv", dv, v, v.size(3));
  check_scalars("lse", lse, q);
  if (grad_lse) check_scalars("grad_lse", *grad_lse, q);
  check_mask(q, k, "q", q_num_blocks, q_indices, q_block_lens, kv_block_lens, q_block_size,
             kv_block_size, is_causal);
  BackwardArguments arguments{
      geometry_of(q, k, v, q_num_blocks, q_indices, q_block_lens, kv_block_lens, q_block_size,
                  kv_block_size, scale, is_causal),
      rows_of(grad_out),
      rows_of(q),
      rows_of(k),
      rows_of(v),
      rows_of(out),
      rows_of(dq),
      rows_of(dk),
      rows_of(dv),
      scalars_of(lse),
      grad_lse ? scalars_of(*grad_lse) : RowScalars{}};
  const Geometry& g = arguments.geometry;
  if (q_num_blocks) check_lists("q", g.lists, *q_num_blocks, *q_indices, g.q.blocks());
  kernels().backward(arguments);
}

}  // namespace
}  // namespace video_attn::cpu

TORCH_LIBRARY_IMPL(video_attn, CPU, library) {
  library.impl("cpu_attention_forward", &video_attn::cpu::attention_forward);
  library.impl("cpu_attention_backward", &video_attn::cpu::attention_backward);
  library.impl("cpu_quantized_forward", &video_attn::cpu::quantized_forward);
}

TORCH_LIBRARY_IMPL(video_attn, CompositeExplicitAutograd, library) {
  library.impl("cpu_description", &video_attn::cpu::describe);
}
