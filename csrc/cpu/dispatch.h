// The kernels of each CPU capability, and the choice among them.
#pragma once

#include <string>

#include "cpu/arguments.h"

namespace video_attn::cpu {

struct Kernels {
  const char* capability;
  void (*forward)(const ForwardArguments&);
  void (*backward)(const BackwardArguments&);
  void (*quantized_forward)(const QuantizedArguments&);
};

// The kernels for the capability that torch itself runs with (ATEN_CPU_CAPABILITY included).
const Kernels& kernels();

// Whether bf16 operands can go into the matrix kernel: the CPU has bf16 products, and torch was
// built with, and currently allows, the kernels that use them.
bool bf16_products();

// The same for products of unsigned with signed 8-bit integers, exact in their 32-bit sums.
bool int8_products();

// One line for people: the capability and how each dtype is multiplied.
std::string describe();

}  // namespace video_attn::cpu
