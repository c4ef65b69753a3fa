#include "cpu/dispatch.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

// kernels/*.cpp is compiled once per capability, into a namespace of that name.
#define VIDEO_ATTN_DECLARE(CAPABILITY)               \
  namespace video_attn::cpu::CAPABILITY {            \
  void attention_forward(const ForwardArguments&);   \
  void attention_backward(const BackwardArguments&); \
  }
#define VIDEO_ATTN_KERNELS(CAPABILITY) \
  Kernels { #CAPABILITY, &CAPABILITY::attention_forward, &CAPABILITY::attention_backward }

VIDEO_ATTN_DECLARE(DEFAULT)
#if defined(__x86_64__)
VIDEO_ATTN_DECLARE(AVX2)
VIDEO_ATTN_DECLARE(AVX512)
#endif

namespace video_attn::cpu {
namespace {

Kernels choose() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return VIDEO_ATTN_KERNELS(AVX512);
  if (capability == "AVX2") return VIDEO_ATTN_KERNELS(AVX2);
#endif
  return VIDEO_ATTN_KERNELS(DEFAULT);
}

// The kernel itself is asked, with a product of one pair: torch does not export its own check.
bool probe_bf16_products() {
#if defined(__x86_64__)
  if (std::string(kernels().capability) != "AVX512") return false;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  alignas(64) const at::BFloat16 a[2] = {1.0f, 2.0f}, b[2] = {3.0f, 4.0f};
  alignas(64) float c[1] = {0.0f};
  try {
    at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, a, b, c, /*is_vnni=*/true);
    at::native::cpublas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  return c[0] == 11.0f;
#else
  return false;
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

bool bf16_products() {
  // Asked each time: torch.backends.mkldnn can be switched off, and then the kernel refuses.
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool supported = probe_bf16_products();
  return supported;
}

std::string describe() {
  return std::string(kernels().capability) + ", bfloat16 multiplied as " +
         (bf16_products() ? "bfloat16" : "float32") + ", float16 as float32";
}

}  // namespace video_attn::cpu
