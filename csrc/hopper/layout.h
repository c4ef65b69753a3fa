#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace video_attn::hopper {

// Lays arrays out one after another, each 256-aligned, from `base` on; null to learn their size.
struct Layout {
  void* base;
  size_t bytes = 0;

  template <class T>
  void place(T*& array, int64_t length) {
    array = reinterpret_cast<T*>(static_cast<char*>(base) + bytes);
    bytes += (static_cast<size_t>(length) * sizeof(T) + 255) / 256 * 256;
  }
};

}  // namespace video_attn::hopper
