#pragma once

namespace video_attn::hopper {

// 2^x; 0 for minus infinity.
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace video_attn::hopper
