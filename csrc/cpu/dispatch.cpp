#include "cpu/dispatch.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

// kernels/*.cpp is compiled once per capability, into a namespace of that name.
#define VIDEO_ATTN_DECLARE(CAPABILITY)               \
  namespace video_attn::cpu::CAPABILITY {            \
  void attention_forward(const ForwardArguments&);   \
  void attention_backward(const BackwardArguments&); \
  void quantized_forward(const QuantizedArguments&); \
  }
#define VIDEO_ATTN_KERNELS(CAPABILITY)                                            \
  Kernels {                                                                       \
    #CAPABILITY, &CAPABILITY::attention_forward, &CAPABILITY::attention_backward, \
        &CAPABILITY::quantized_forward                                            \
  }

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

// The kernel itself is asked, with a product of one group: torch does not export its own check.
template <typename A, typename B, typename C, int64_t kGroup>
bool multiplies(const A (&a)[kGroup], const B (&b)[kGroup], C expected) {
  C c[1] = {0};
  try {
    at::native::cpublas::brgemm(1, 1, kGroup, kGroup, 1, 1, false, a, b, c, /*is_vnni=*/true);
    at::native::cpublas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  return c[0] == expected;
}

bool probe_bf16_products() {
#if defined(__x86_64__)
  if (std::string(kernels().capability) != "AVX512") return false;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  return multiplies<at::BFloat16, at::BFloat16, float, 2>({1.0f, 2.0f}, {3.0f, 4.0f}, 11.0f);
#else
  return false;
#endif
}

// The largest numbers: a CPU without VNNI adds neighbouring products in 16 bits, and saturates.
bool probe_int8_products() {
#if defined(__x86_64__)
  if (std::string(kernels().capability) != "AVX512") return false;
  if (!__builtin_cpu_supports("avx512vnni")) return false;
  return multiplies<unsigned char, signed char, int32_t, 4>({255, 255, 255, 255},
                                                            {127, 127, 127, 127}, 4 * 255 * 127);
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

bool int8_products() {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool supported = probe_int8_products();
  return supported;
}

std::string describe() {
  return std::string(kernels().capability) + ", bfloat16 multiplied as " +
         (bf16_products() ? "bfloat16" : "float32") + ", float16 as float32, int8 codes as " +
         (int8_products() ? "int8" : "float32") + ", float8 codes as " +
         (bf16_products() ? "bfloat16" : "float32");
}

}  // namespace video_attn::cpu
