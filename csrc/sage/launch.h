// The launchers: from parameters to a kernel on a stream. They include neither torch nor CUDA.
#pragma once

#include "params.h"

namespace video_attn::sage {

// `capability`: of the current device, as 80 or 90. `stream`: a cudaStream_t.
// Each returns null, or in words why nothing was launched.
const char* launch_quantize(const QuantizeParams& params, int capability, void* stream);
const char* launch_attention(const AttentionParams& params, int capability, void* stream);

// Floats that QuantizeParams::workspace must hold; `params` need not have it.
int64_t workspace_size(const QuantizeParams& params);

// Largest head dim; codes are padded to 64 or to this.
inline constexpr int kMaxHeadDim = 128;

}  // namespace video_attn::sage
