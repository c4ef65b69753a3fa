// What must hold for the kernels to stay inside their tensors. The public function has checked the
// user's arguments; these checks also serve a direct call of the operators, and read the lists.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/arguments.h"

namespace video_attn::cpu {

// q, k, v fit together and have unit last strides.
void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

// `x` is [B, H, S, dim] with the sizes and dtype of `like`, and a unit last stride.
void check_rows(const char* name, const at::Tensor& x, const at::Tensor& like, int64_t dim);

// `x` is fp32 [B, Hq, Sq].
void check_scalars(const char* name, const at::Tensor& x, const at::Tensor& q);

// Shapes and dtypes of the mask; `side` is the side that is listed, "kv" or "q".
void check_mask(const at::Tensor& q, const at::Tensor& k, const char* side,
                const std::optional<at::Tensor>& counts, const std::optional<at::Tensor>& indices,
                const std::optional<at::Tensor>& q_lens, const std::optional<at::Tensor>& kv_lens,
                int64_t q_block_size, int64_t kv_block_size, bool is_causal);

// Counts within the lists, and indices ascending in [0, blocks).
void check_lists(const char* side, const BlockLists& lists, const at::Tensor& counts,
                 const at::Tensor& indices, int64_t blocks);

}  // namespace video_attn::cpu
