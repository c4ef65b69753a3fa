// The operators of the Hopper kernels: from tensors to parameters, with every check that keeps a
// kernel inside its tensors. Schemas: backends/hopper.py.
//
// A Context stands for the place of execution: made from a tensor, it has made the tensor's device
// current, and knows the `stream` to launch on and how errors are `describe`d.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>

#include "hopper/launch.h"
#include "hopper/step_list.h"

namespace video_attn::hopper {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr int32_t kDenseBlock = 128;  // into which dense attention is cut
inline constexpr int32_t kMaxHeadDim = 128;
inline constexpr int32_t kAlignment = 16;  // bytes, of addresses and strides
inline constexpr int32_t kLongestList = 1 << 24;

// The block sizes that an operator takes.
struct BlockSizes {
  int32_t smallest, largest;
  bool dense;  // takes dense attention too
};

inline constexpr BlockSizes kCoarseBlocks{128, 1 << 20, true};
inline constexpr BlockSizes kFineBlocks{64, 64, false};

// One operator: its name in messages, its launcher, and the block sizes it takes.
template <class Params>
struct Kernel {
  const char* name;
  cudaError_t (*launch)(const Params&, const Allocate&, cudaStream_t);
  BlockSizes blocks;
};

// What all tensors of a call are measured by.
struct Call {
  Tensor q;
  int64_t batch, heads, kv_heads, q_length, kv_length, head_dim;

  Call(const Tensor& q, const Tensor& k) : q(q) {
    STD_TORCH_CHECK(q.dim() == 4, "q must have 4 dimensions, has ", q.dim());
    STD_TORCH_CHECK(k.dim() == 4, "k must have 4 dimensions, has ", k.dim());
    batch = q.size(0), heads = q.size(1), q_length = q.size(2), head_dim = q.size(3);
    kv_heads = k.size(1), kv_length = k.size(2);
    const int64_t limit = 0x7FFFFF00;
    STD_TORCH_CHECK(batch > 0 && batch <= 65535, "batch is ", batch, ", allowed: 1 to 65535");
    STD_TORCH_CHECK(heads > 0 && heads <= 65535, "heads are ", heads, ", allowed: 1 to 65535");
    STD_TORCH_CHECK(q_length > 0 && q_length <= limit && kv_length > 0 && kv_length <= limit,
                    "sequence lengths are ", q_length, " and ", kv_length, ", allowed: 1 to ",
                    limit);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "heads ", heads,
                    " is not a multiple of kv heads ", kv_heads);
    STD_TORCH_CHECK(head_dim > 0 && head_dim <= kMaxHeadDim && head_dim % 8 == 0, "head_dim is ",
                    head_dim, ", allowed: multiples of 8 up to ", kMaxHeadDim);
  }

  Element element() const {
    const bool is_half = q.scalar_type() == ScalarType::Half;
    STD_TORCH_CHECK(is_half || q.scalar_type() == ScalarType::BFloat16,
                    "q must be float16 or bfloat16");
    return is_half ? Element::kFloat16 : Element::kBFloat16;
  }

  void check_device(const char* name, const Tensor& x) const {
    STD_TORCH_CHECK(x.device() == q.device(), name, " is on another device than q");
  }

  // A tensor of `tensor_heads` heads and `length` tokens, fit for the tensor memory accelerator.
  Tensor4 tensor4(const char* name, const Tensor& x, int64_t tensor_heads, int64_t length) const {
    check_device(name, x);
    STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
    STD_TORCH_CHECK(x.dim() == 4, name, " must have 4 dimensions, has ", x.dim());
    const std::array<int64_t, 4> sizes{batch, tensor_heads, length, head_dim};
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(x.size(i) == sizes[i], name, " has size ", x.size(i), " in dimension ", i,
                      ", expected ", sizes[i]);
    }
    STD_TORCH_CHECK(x.stride(3) == 1, name, " must have stride 1 on its channels");
    for (int i = 0; i < 3; ++i) {  // nobody steps along a dimension of size 1
      STD_TORCH_CHECK(sizes[i] == 1 || (x.stride(i) > 0 && x.stride(i) * 2 % kAlignment == 0), name,
                      " has stride ", x.stride(i), " in dimension ", i,
                      ", which is not a positive multiple of ", kAlignment, " bytes");
    }
    const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
    STD_TORCH_CHECK(address % kAlignment == 0, name, " does not start at a multiple of ",
                    kAlignment, " bytes");
    return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
  }

  // fp32 [batch, heads, q length], contiguous.
  float* row_values(const char* name, const Tensor& x) const {
    check_device(name, x);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, " must be float32");
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch && x.size(1) == heads &&
                        x.size(2) == q_length && x.is_contiguous(),
                    name, " must be contiguous and of shape [", batch, ", ", heads, ", ", q_length,
                    "]");
    return static_cast<float*>(x.data_ptr());
  }

  const int32_t* integers(const char* name, const Tensor& x) const {
    check_device(name, x);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int, name, " must be int32");
    return static_cast<const int32_t*>(x.data_ptr());
  }
};

// The mask's arguments, as both operators take them.
struct MaskArguments {
  OptionalTensor q_block_lens, kv_block_lens;
  int64_t q_block_size, kv_block_size;
};

// A stride by which a dimension of size 1 stands for all.
inline int64_t broadcast_stride(const Tensor& x, int64_t dim) {
  return x.size(dim) == 1 ? 0 : x.stride(dim);
}

inline int64_t block_count(const Side& side) {
  return (static_cast<int64_t>(side.length) + side.block_size - 1) / side.block_size;
}

template <class Params>
Side make_side(const Kernel<Params>& kernel, const Call& call, const char* name, int64_t length,
               int64_t block_size, const OptionalTensor& lens) {
  Side side{static_cast<int32_t>(length), kDenseBlock, {nullptr, 0}};
  if (block_size == 0) {  // dense attention
    STD_TORCH_CHECK(kernel.blocks.dense, kernel.name, " needs block lists");
    STD_TORCH_CHECK(!lens, name, "_block_lens without a block size");
    return side;
  }
  STD_TORCH_CHECK(block_size % kUnit == 0 && block_size >= kernel.blocks.smallest &&
                      block_size <= kernel.blocks.largest,
                  name, "_block_size is ", block_size, ", allowed: multiples of ", kUnit, " from ",
                  kernel.blocks.smallest, " to ", kernel.blocks.largest);
  side.block_size = static_cast<int32_t>(block_size);
  if (lens) {
    STD_TORCH_CHECK(lens->dim() == 2 && (lens->size(0) == 1 || lens->size(0) == call.batch) &&
                        lens->size(1) == block_count(side) &&
                        (lens->stride(1) == 1 || lens->size(1) == 1),
                    name, "_block_lens must be [1 or ", call.batch, ", ", block_count(side),
                    "] with stride 1 on its blocks");
    side.lens = {call.integers("block lens", *lens), broadcast_stride(*lens, 0)};
  }
  return side;
}

// Lists of `rows` blocks each: the key blocks of query blocks, or the other way round.
inline BlockLists make_lists(const Call& call, const char* name, const OptionalTensor& counts,
                             const OptionalTensor& indices, int64_t rows) {
  STD_TORCH_CHECK(counts.has_value() == indices.has_value(), name,
                  ": counts and indices come together");
  if (!counts) return {};
  STD_TORCH_CHECK(counts->dim() == 3 && indices->dim() == 4, name,
                  ": counts must have 3 dimensions, indices 4");
  for (const Tensor* x : {&*counts, &*indices}) {
    STD_TORCH_CHECK((x->size(0) == 1 || x->size(0) == call.batch) &&
                        (x->size(1) == 1 || x->size(1) == call.heads) && x->size(2) == rows,
                    name, " must be [1 or ", call.batch, ", 1 or ", call.heads, ", ", rows,
                    " blocks]");
  }
  STD_TORCH_CHECK(indices->size(3) <= kLongestList, name, " have ", indices->size(3),
                  " entries a row, allowed: up to ", kLongestList);
  return {call.integers(name, *counts),
          call.integers(name, *indices),
          static_cast<int32_t>(indices->size(3)),
          broadcast_stride(*counts, 0),
          broadcast_stride(*counts, 1),
          counts->stride(2),
          broadcast_stride(*indices, 0),
          broadcast_stride(*indices, 1),
          indices->stride(2),
          indices->stride(3)};
}

template <class Params>
Problem make_problem(const Kernel<Params>& kernel, const Call& call, const MaskArguments& mask,
                     double scale) {
  STD_TORCH_CHECK((mask.q_block_size == 0) == (mask.kv_block_size == 0),
                  "q_block_size and kv_block_size are both 0, for dense attention, or neither");
  STD_TORCH_CHECK(scale >= 0.0, "scale is ", scale, ", allowed: 0 and more");
  return {static_cast<int32_t>(call.batch),
          static_cast<int32_t>(call.heads),
          static_cast<int32_t>(call.kv_heads),
          static_cast<int32_t>(call.head_dim),
          call.element(),
          make_side(kernel, call, "q", call.q_length, mask.q_block_size, mask.q_block_lens),
          make_side(kernel, call, "kv", call.kv_length, mask.kv_block_size, mask.kv_block_lens),
          static_cast<float>(scale)};
}

template <class Context, class Params>
void run(const Kernel<Params>& kernel, const Params& params, const Tensor& q) {
  const Context context(kernel.name, q);
  // Freed with this call: torch's allocator gives it only to later work of the same stream.
  std::optional<Tensor> memory;
  const auto allocate = [&](size_t bytes) {
    memory = torch::stable::new_empty(q, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    return memory->data_ptr();
  };
  const cudaError_t error = kernel.launch(params, allocate, context.stream);
  STD_TORCH_CHECK(error == cudaSuccess, kernel.name, ": CUDA error ", static_cast<int>(error), ", ",
                  Context::describe(error));
}

template <class Context, const Kernel<ForwardParams>& kernel>
void forward(Tensor q, Tensor k, Tensor v, OptionalTensor kv_num_blocks, OptionalTensor kv_indices,
             OptionalTensor q_block_lens, OptionalTensor kv_block_lens, int64_t q_block_size,
             int64_t kv_block_size, double scale, Tensor out, Tensor lse) {
  const Call call(q, k);
  const MaskArguments mask{q_block_lens, kv_block_lens, q_block_size, kv_block_size};
  ForwardParams p{};
  p.problem = make_problem(kernel, call, mask, scale);
  p.q = call.tensor4("q", q, call.heads, call.q_length);
  p.k = call.tensor4("k", k, call.kv_heads, call.kv_length);
  p.v = call.tensor4("v", v, call.kv_heads, call.kv_length);
  p.out = call.tensor4("out", out, call.heads, call.q_length);
  p.lse = call.row_values("lse", lse);
  STD_TORCH_CHECK(kv_num_blocks.has_value() == (q_block_size != 0),
                  "block lists and block sizes come together");
  p.lists =
      make_lists(call, "key block lists", kv_num_blocks, kv_indices, block_count(p.problem.q_side));
  run<Context>(kernel, p, q);
}

template <class Context, const Kernel<BackwardParams>& kernel>
void backward(Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out,
              Tensor lse, OptionalTensor kv_num_blocks, OptionalTensor kv_indices,
              OptionalTensor q_num_blocks, OptionalTensor q_indices, OptionalTensor q_block_lens,
              OptionalTensor kv_block_lens, int64_t q_block_size, int64_t kv_block_size,
              double scale, bool deterministic, Tensor dq, Tensor dk, Tensor dv) {
  const Call call(q, k);
  const MaskArguments mask{q_block_lens, kv_block_lens, q_block_size, kv_block_size};
  BackwardParams p{};
  p.problem = make_problem(kernel, call, mask, scale);
  p.q = call.tensor4("q", q, call.heads, call.q_length);
  p.k = call.tensor4("k", k, call.kv_heads, call.kv_length);
  p.v = call.tensor4("v", v, call.kv_heads, call.kv_length);
  p.out = call.tensor4("out", out, call.heads, call.q_length);
  p.grad_out = call.tensor4("grad_out", grad_out, call.heads, call.q_length);
  p.dq = call.tensor4("dq", dq, call.heads, call.q_length);
  p.dk = call.tensor4("dk", dk, call.kv_heads, call.kv_length);
  p.dv = call.tensor4("dv", dv, call.kv_heads, call.kv_length);
  p.lse = call.row_values("lse", lse);
  p.grad_lse = grad_lse ? call.row_values("grad_lse", *grad_lse) : nullptr;
  STD_TORCH_CHECK(kv_num_blocks.has_value() == (q_block_size != 0) &&
                      q_num_blocks.has_value() == (q_block_size != 0),
                  "block lists, their transpose and block sizes come together");
  p.lists =
      make_lists(call, "key block lists", kv_num_blocks, kv_indices, block_count(p.problem.q_side));
  p.transposed = make_lists(call, "query block lists", q_num_blocks, q_indices,
                            block_count(p.problem.kv_side));
  p.deterministic = deterministic;
  run<Context>(kernel, p, q);
}

}  // namespace video_attn::hopper
