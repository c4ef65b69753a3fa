// Tensor maps: how the tensor memory accelerator (TMA) sees a strided [batch, heads, tokens,
// channels] tensor. Host code. The driver's encoder is looked up through the runtime, so that no
// library needs libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper/params.h"

namespace video_attn::hopper {

struct Extents {
  int32_t batch, heads, length, head_dim;
};

namespace detail {

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12050  // which has no other
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol,
                                                                12000, cudaEnableDefault, &found);
#endif
    const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol) : nullptr;
  }();
  return encoder;
}

}  // namespace detail

// A box is `box_tokens` tokens (at most 256) by 128 bytes of channels of one head, stored in shared
// memory at a multiple of 1024 bytes in the 128-byte swizzle: the layout of a column of 64 16-bit
// channels of a ThunderKittens tile. What lies outside the tensor reads as zero and is not written;
// a box always counts in full on its barrier. The coordinates are {channel, token, head, batch}.
inline cudaError_t make_tensor_map(CUtensorMap* map, const Tensor4& tensor, const Extents& extents,
                                   Element element, int32_t box_tokens) {
  const auto encode = detail::tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr cuuint64_t kWidth = 2;  // bytes of an element
  const auto type = element == Element::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[4] = {
      static_cast<cuuint64_t>(extents.head_dim), static_cast<cuuint64_t>(extents.length),
      static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  // The stride of a dimension of one element means nothing and may be anything, also illegal here.
  const auto stride = [&](int32_t extent, int64_t elements) -> cuuint64_t {
    return extent > 1 ? static_cast<cuuint64_t>(elements) * kWidth : 16;
  };
  const cuuint64_t strides[3] = {stride(extents.length, tensor.token_stride),
                                 stride(extents.heads, tensor.head_stride),
                                 stride(extents.batch, tensor.batch_stride)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(128 / kWidth),
                             static_cast<cuuint32_t>(box_tokens), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, type, 4, tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace video_attn::hopper
