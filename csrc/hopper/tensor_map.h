// Tensor maps: how the tensor memory accelerator (TMA) sees a strided [batch, heads, tokens,
// channels] tensor. Host code. The driver's encoder is looked up through the runtime, so that no
// library needs libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper/params.h"
#include "hopper/video_boxes.h"

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

struct Axis {
  int64_t size, stride;  // elements; one step of the outer axes is `stride` elements
  int32_t box;
};

// A box is 128 bytes of channels by the boxes of the outer axes (at most 256 tokens in all), stored
// in shared memory at a multiple of 1024 bytes in the 128-byte swizzle: the layout of a column of
// 64 16-bit channels of a ThunderKittens tile. What lies outside the tensor reads as zero and is
// not written; a box always counts in full on its barrier.
template <int kOuter>
cudaError_t encode_tensor_map(CUtensorMap* map, void* data, int64_t channels,
                              const Axis (&outer)[kOuter], Element element) {
  const auto encode = detail::tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr cuuint64_t kWidth = 2;  // bytes of an element
  const auto type = element == Element::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint64_t sizes[kOuter + 1] = {static_cast<cuuint64_t>(channels)};
  cuuint64_t strides[kOuter];
  cuuint32_t box[kOuter + 1] = {static_cast<cuuint32_t>(128 / kWidth)};
  cuuint32_t steps[kOuter + 1] = {1};
  for (int axis = 0; axis < kOuter; ++axis) {
    const auto& [size, stride, box_size] = outer[axis];
    sizes[axis + 1] = static_cast<cuuint64_t>(size);
    // The stride of a dimension of one element means nothing and may be anything, also illegal
    // here.
    strides[axis] = size > 1 ? static_cast<cuuint64_t>(stride) * kWidth : 16;
    box[axis + 1] = static_cast<cuuint32_t>(box_size);
    steps[axis + 1] = 1;
  }
  const CUresult result =
      encode(map, type, kOuter + 1, data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Boxes of `box_tokens` tokens; the coordinates are {channel, token, head, batch}.
inline cudaError_t make_tensor_map(CUtensorMap* map, const Tensor4& tensor, const Extents& extents,
                                   Element element, int32_t box_tokens) {
  const Axis outer[] = {{extents.length, tensor.token_stride, box_tokens},
                        {extents.heads, tensor.head_stride, 1},
                        {extents.batch, tensor.batch_stride, 1}};
  return encode_tensor_map(map, tensor.data, extents.head_dim, outer, element);
}

// A tensor whose first tokens are a video in raster order, as boxes of 64 tokens. The coordinates
// are {channel + head * head_channels, w, h, t, head * head_step + batch * batch_step}: five
// dimensions are all there are, so heads and batches share one, or heads lie in the channels.
struct VideoMap {
  CUtensorMap map;
  int32_t head_channels, head_step, batch_step;
};

inline cudaError_t make_video_map(VideoMap& video, const Tensor4& tensor, const Extents& extents,
                                  Element element, const VideoBoxes& boxes) {
  int64_t channels = extents.head_dim;
  Axis heads{extents.heads, tensor.head_stride, 1};
  video.head_channels = 0, video.head_step = 1, video.batch_step = 0;
  if (extents.heads == 1) {
    heads = {extents.batch, tensor.batch_stride, 1};
    video.head_step = 0, video.batch_step = 1;
  } else if (extents.batch > 1 && tensor.batch_stride == tensor.head_stride * extents.heads) {
    heads.size = static_cast<int64_t>(extents.heads) * extents.batch;
    video.batch_step = extents.heads;
  } else if (extents.batch > 1) {
    // Channels past the head must not be those of the next one.
    if (tensor.head_stride != extents.head_dim || extents.head_dim % 64 != 0) {
      return cudaErrorInvalidValue;
    }
    channels *= extents.heads;
    heads = {extents.batch, tensor.batch_stride, 1};
    video.head_channels = extents.head_dim, video.head_step = 0, video.batch_step = 1;
  }
  const int64_t row = tensor.token_stride * boxes.width;
  const Axis outer[] = {
      {boxes.width, tensor.token_stride, boxes.tile_w},
      {boxes.height, row, boxes.box_h},
      {boxes.tokens / boxes.height / boxes.width, row * boxes.height, boxes.box_t},
      heads};
  return encode_tensor_map(&video.map, tensor.data, channels, outer, element);
}

}  // namespace video_attn::hopper
