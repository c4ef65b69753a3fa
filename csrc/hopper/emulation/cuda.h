// Of the CUDA driver's header what csrc/hopper uses, for the host emulation: a tensor map is a
// plain record of what its encoder was given.
#pragma once

#include <cstdint>
#include <cstring>

using CUresult = int;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

inline constexpr CUresult CUDA_SUCCESS = 0;
inline constexpr CUresult CUDA_ERROR_INVALID_VALUE = 1;

enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
  char* data;
  int32_t width;        // bytes of an element
  uint64_t sizes[4];    // channels first
  uint64_t strides[3];  // bytes
  int32_t box_channels, box_rows;
};

// With the driver's own checks, as its manual states them.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t dimensions,
                                       void* data, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  constexpr int kWidth = 2;
  bool legal = dimensions == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
               box[0] * kWidth == 128 && box[1] <= 256 && box[2] == 1 && box[3] == 1;
  for (int i = 0; i < 4; ++i) {
    legal = legal && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && steps[i] == 1;
  }
  for (int i = 0; i < 3; ++i) {
    legal = legal && strides[i] > 0 && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
  }
  if (!legal) return CUDA_ERROR_INVALID_VALUE;
  map->data = static_cast<char*>(data);
  map->width = kWidth;
  std::memcpy(map->sizes, sizes, sizeof(map->sizes));
  std::memcpy(map->strides, strides, sizeof(map->strides));
  map->box_channels = static_cast<int32_t>(box[0]);
  map->box_rows = static_cast<int32_t>(box[1]);
  return CUDA_SUCCESS;
}
