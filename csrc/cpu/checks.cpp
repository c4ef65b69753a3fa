#include "cpu/checks.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <string>

namespace video_attn::cpu {
namespace {

constexpr int64_t kMaxHeadDim = 256;

void check_tensor(const char* name, const at::Tensor& x, int64_t dims, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.is_cpu(), name, " must be on the CPU, got ", x.device());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == dims, name, " must have ", dims, " dimensions, got ", x.sizes());
}

void check_unit_stride(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.stride(3) == 1 || x.size(3) == 1, name,
                    " must have stride 1 on its last dimension, got strides ", x.strides());
}

void check_lens(const char* name, const std::optional<at::Tensor>& lens, int64_t batch,
                int64_t blocks) {
  if (!lens) return;
  check_tensor(name, *lens, 2, at::kInt);
  TORCH_CHECK_VALUE((lens->size(0) == 1 || lens->size(0) == batch) && lens->size(1) == blocks, name,
                    " must be [1 or ", batch, ", ", blocks, "], got ", lens->sizes());
}

void check_list_shape(const std::string& name, const at::Tensor& x, int64_t dims,
                      const at::Tensor& q, int64_t blocks) {
  check_tensor(name.c_str(), x, dims, at::kInt);
  TORCH_CHECK_VALUE((x.size(0) == 1 || x.size(0) == q.size(0)) &&
                        (x.size(1) == 1 || x.size(1) == q.size(1)) && x.size(2) == blocks,
                    name, " must be [1 or ", q.size(0), ", 1 or ", q.size(1), ", ", blocks,
                    dims == 4 ? ", K]" : "]", ", got ", x.sizes());
}

}  // namespace

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  using Named = std::pair<const char*, const at::Tensor&>;
  for (const auto& [name, x] : {Named{"q", q}, Named{"k", k}, Named{"v", v}}) {
    check_tensor(name, x, 4, q.scalar_type());
    TORCH_CHECK_VALUE(x.numel() > 0, name, " must not be empty, got ", x.sizes());
    TORCH_CHECK_VALUE(x.size(0) == q.size(0), name, " must have the batch size of q, ", q.size(0),
                      ", got ", x.size(0));
    TORCH_CHECK_VALUE(x.size(3) <= kMaxHeadDim, "head_dim of ", name, " must be 1 to ", kMaxHeadDim,
                      ", got ", x.size(3));
    check_unit_stride(name, x);
  }
  TORCH_CHECK_VALUE(k.size(3) == q.size(3), "k must have the head_dim of q, ", q.size(3), ", got ",
                    k.size(3));
  TORCH_CHECK_VALUE(v.size(1) == k.size(1) && v.size(2) == k.size(2),
                    "v must have the heads and tokens of k, ", k.sizes(), ", got ", v.sizes());
  TORCH_CHECK_VALUE(q.size(1) % k.size(1) == 0, "q must have a multiple of k's heads: q has ",
                    q.size(1), ", k has ", k.size(1));
}

void check_rows(const char* name, const at::Tensor& x, const at::Tensor& like, int64_t dim) {
  check_tensor(name, x, 4, like.scalar_type());
  TORCH_CHECK_VALUE(x.sizes().slice(0, 3) == like.sizes().slice(0, 3) && x.size(3) == dim, name,
                    " must be ", like.sizes().slice(0, 3), " and ", dim, ", got ", x.sizes());
  check_unit_stride(name, x);
}

void check_scalars(const char* name, const at::Tensor& x, const at::Tensor& q) {
  check_tensor(name, x, 3, at::kFloat);
  TORCH_CHECK_VALUE(x.sizes() == q.sizes().slice(0, 3), name, " must be ", q.sizes().slice(0, 3),
                    ", got ", x.sizes());
}

void check_mask(const at::Tensor& q, const at::Tensor& k, const char* side,
                const std::optional<at::Tensor>& counts, const std::optional<at::Tensor>& indices,
                const std::optional<at::Tensor>& q_lens, const std::optional<at::Tensor>& kv_lens,
                int64_t q_block_size, int64_t kv_block_size, bool is_causal) {
  const std::string count_name = std::string(side) + "_num_blocks";
  const std::string index_name = std::string(side) + "_indices";
  TORCH_CHECK_VALUE(counts.has_value() == indices.has_value(), count_name, " and ", index_name,
                    " must be given together");
  if (!counts) {
    TORCH_CHECK_VALUE(!q_lens && !kv_lens, count_name,
                      " must be given with q_block_lens or kv_block_lens");
    return;
  }
  TORCH_CHECK_VALUE(!is_causal, "is_causal must be False with block lists");
  TORCH_CHECK_VALUE(q_block_size >= 1, "q_block_size must be >= 1, got ", q_block_size);
  TORCH_CHECK_VALUE(kv_block_size >= 1, "kv_block_size must be >= 1, got ", kv_block_size);
  const int64_t q_blocks = ceil_div(q.size(2), q_block_size);
  const int64_t kv_blocks = ceil_div(k.size(2), kv_block_size);
  const int64_t rows = std::string(side) == "kv" ? q_blocks : kv_blocks;
  check_list_shape(count_name, *counts, 3, q, rows);
  check_list_shape(index_name, *indices, 4, q, rows);
  check_lens("q_block_lens", q_lens, q.size(0), q_blocks);
  check_lens("kv_block_lens", kv_lens, q.size(0), kv_blocks);
}

void check_lists(const char* side, const BlockLists& lists, const at::Tensor& counts,
                 const at::Tensor& indices, int64_t blocks) {
  const int64_t heads = std::max(counts.size(1), indices.size(1)), rows = counts.size(2);
  const int64_t batch = std::max(counts.size(0), indices.size(0)), longest = indices.size(3);
  constexpr int64_t kRowsPerThread = 256;
  at::parallel_for(0, batch * heads * rows, kRowsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = n % rows, head = n / rows % heads, b = n / rows / heads;
      const ListRow list = lists.row(b, head, row);
      TORCH_CHECK_VALUE(list.count >= 0 && list.count <= longest, side, "_num_blocks[", b, ", ",
                        head, ", ", row, "] must be 0 to ", longest, ", got ", list.count);
      int64_t previous = -1;
      for (int64_t i = 0; i < list.count; ++i) {
        TORCH_CHECK_VALUE(list[i] > previous && list[i] < blocks, side, "_indices[", b, ", ", head,
                          ", ", row, ", ", i, "] must be ascending and below ", blocks, ", got ",
                          list[i], i > 0 ? " after " : "", i > 0 ? std::to_string(previous) : "");
        previous = list[i];
      }
    }
  });
}

}  // namespace video_attn::cpu
