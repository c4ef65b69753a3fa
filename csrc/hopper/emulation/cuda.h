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
  static constexpr int kMaxDimensions = 5;

  char* data;
  int32_t width;  // bytes of an element
  int32_t dimensions;
  uint64_t sizes[kMaxDimensions];        // channels first
  uint64_t strides[kMaxDimensions - 1];  // bytes
  int32_t box[kMaxDimensions];

  int32_t box_rows() const {
    int32_t rows = 1;
    for (int d = 1; d < dimensions; ++d) rows *= box[d];
    return rows;
  }
};

// With the driver's own checks, as its manual states them.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t dimensions,
                                       void* data, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  constexpr int kWidth = 2;
  bool legal = (dimensions == 4 || dimensions == 5) &&
               reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * kWidth == 128;
  *map = {};
  map->data = static_cast<char*>(data);
  map->width = kWidth;
  map->dimensions = static_cast<int32_t>(dimensions);
  for (cuuint32_t i = 0; legal && i < dimensions; ++i) {
    legal = sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && steps[i] == 1 && box[i] > 0 &&
            box[i] <= 256;
    map->sizes[i] = sizes[i];
    map->box[i] = static_cast<int32_t>(box[i]);
  }
  for (cuuint32_t i = 0; legal && i + 1 < dimensions; ++i) {
    legal = strides[i] > 0 && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
    map->strides[i] = strides[i];
  }
  return legal ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
