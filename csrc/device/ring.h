#pragma once

#include <cstdint>

#include "device/language.h"

namespace video_attn {

// A place in a ring of `kStages` stages, and the parity of the phase that its barriers are in.
template <int kStages>
struct RingPlace {
  int32_t stage = 0;
  uint32_t parity = 0;

  VIDEO_ATTN_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // By fewer than `kStages` places.
  VIDEO_ATTN_DEVICE void advance_by(int32_t places) {
    stage += places;
    if (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
  // By any number of places.
  VIDEO_ATTN_DEVICE void advance_far(int32_t places) {
    const int32_t wraps = (stage + places) / kStages;
    stage += places - wraps * kStages;
    parity ^= wraps & 1;
  }
  VIDEO_ATTN_DEVICE int32_t previous() const { return (stage == 0 ? kStages : stage) - 1; }
};

}  // namespace video_attn
