// The words that CUDA has and C++ has not, for code that both compile.
#pragma once

#ifdef __CUDACC__
#define VIDEO_ATTN_DEVICE __device__ inline
#define VIDEO_ATTN_HOST_DEVICE __host__ __device__
#else
#define VIDEO_ATTN_DEVICE inline
#define VIDEO_ATTN_HOST_DEVICE
#endif
