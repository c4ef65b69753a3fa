#include "launch.h"
#include "quantize_kernel.h"
#include "score_shift_kernel.h"

namespace video_attn::sage {
namespace {

template <int kDim>
const char* launch_statistics(const QuantizeParams& p, void* stream) {
  const char* error =
      launch<StatisticsKernel<kDim>>(p, chunks_of(p), p.kv_heads, 2 * p.batch, stream);
  return error ? error : launch<FinishKernel<kDim>>(p, p.kv_heads, p.batch, 2, stream);
}

template <int kDim, QkCode kQk, VCode kV>
const char* launch_codes(const QuantizeParams& p, void* stream) {
  const int heads = p.heads + 2 * p.kv_heads;
  if (heads > 65535) return "more than 65535 heads of q, k and v together";
  const int tiles =
      tiles_in(p.q_side.length > p.kv_side.length ? p.q_side.length : p.kv_side.length);
  return launch<QuantizeKernel<kDim, kQk, kV>>(p, tiles, heads, p.batch, stream);
}

template <int kDim>
const char* launch_recipe(const QuantizeParams& p, void* stream) {
  if (p.qk_code == QkCode::kFp8) return launch_codes<kDim, QkCode::kFp8, VCode::kFp8>(p, stream);
  return p.v_code == VCode::kFp8 ? launch_codes<kDim, QkCode::kInt8, VCode::kFp8>(p, stream)
                                 : launch_codes<kDim, QkCode::kInt8, VCode::kFloat16>(p, stream);
}

template <int kDim>
const char* launch_dim(const QuantizeParams& p, void* stream) {
  const char* error = launch_statistics<kDim>(p, stream);
  if (error == nullptr) error = launch_recipe<kDim>(p, stream);
  if (error != nullptr || p.score_shift == nullptr) return error;
  const int key_tiles = tiles_in(p.kv_side.length);
  return launch<ScoreShiftKernel<kDim>>(p, key_tiles, p.heads, p.batch, stream);
}

}  // namespace

const char* launch_quantize(const QuantizeParams& p, int capability, void* stream) {
  if (capability < 80) return "the Sage kernels need compute capability 8.0";
  if (p.v_code == VCode::kFp8 && capability < 89) return "FP8 needs compute capability 8.9";
  return p.padded_dim == 64 ? launch_dim<64>(p, stream) : launch_dim<128>(p, stream);
}

int64_t workspace_size(const QuantizeParams& p) { return statistics_size(p) + q_means_size(p); }

}  // namespace video_attn::sage
