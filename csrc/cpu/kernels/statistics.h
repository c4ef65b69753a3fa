// What quantization must know of a whole sequence before it makes the first code: means of K and V,
// the scale of every channel of V and, for one scale per head, those of Q and K.
#pragma once

#include <vector>

#include "cpu/kernels/codes.h"
#include "cpu/kernels/parallel.h"

namespace video_attn::cpu::CPU_CAPABILITY {

// Sum, least and largest value of every channel.
struct ChannelRange {
  float *sum, *least, *largest;  // [width]
  int64_t width;

  static int64_t floats(int64_t width) { return 3 * width; }
  ChannelRange(float* data, int64_t width)
      : sum(data), least(data + width), largest(data + 2 * width), width(width) {}

  void clear() const {
    std::fill_n(sum, width, 0.0f);
    std::fill_n(least, width, kInfinity);
    std::fill_n(largest, width, -kInfinity);
  }

  void add_sums(const float* rows, int64_t count) const {
    for (int64_t i = 0; i < width; i += Vec::size()) {
      Vec total = Vec::loadu(sum + i);
      for (int64_t r = 0; r < count; ++r) total = total + Vec::loadu(rows + r * width + i);
      total.store(sum + i);
    }
  }

  // maximum and minimum of vec.h keep a NaN.
  void add_ends(const float* rows, int64_t count) const {
    for (int64_t i = 0; i < width; i += Vec::size()) {
      Vec low = Vec::loadu(least + i), high = Vec::loadu(largest + i);
      for (int64_t r = 0; r < count; ++r) {
        const Vec x = Vec::loadu(rows + r * width + i);
        low = at::vec::minimum(low, x);
        high = at::vec::maximum(high, x);
      }
      low.store(least + i);
      high.store(largest + i);
    }
  }

  void add(const ChannelRange& other) const {
    for (int64_t i = 0; i < width; i += Vec::size()) {
      (Vec::loadu(sum + i) + Vec::loadu(other.sum + i)).store(sum + i);
      at::vec::minimum(Vec::loadu(least + i), Vec::loadu(other.least + i)).store(least + i);
      at::vec::maximum(Vec::loadu(largest + i), Vec::loadu(other.largest + i)).store(largest + i);
    }
  }

  // The largest |x - mean| of a channel: rounding is monotone, so that of an end of the range.
  float amax(int64_t channel, float mean) const {
    return max_or_nan(largest[channel] - mean, mean - least[channel]);
  }
};

template <typename T>
class Statistics {
 public:
  explicit Statistics(const QuantizedArguments& arguments)
      : a_(arguments.forward),
        g_(arguments.forward.geometry),
        recipe_(arguments.recipe),
        width_(round_up(g_.head_dim, kLaneGrain)),
        value_width_(round_up(g_.value_dim, kLaneGrain)),
        of_keys_(g_.batch * g_.kv_heads * (width_ + 3 * value_width_)),
        key_scales_(g_.batch * g_.kv_heads, Scale{0.0f, 0.0f}) {
    reduce_keys();
  }

  // Of a (batch, key head): fp32, padded with 0 to a multiple of kLaneGrain. Means that are not
  // subtracted are 0.
  const float* k_mean(int64_t kv_item) const { return row(kv_item); }
  const float* v_mean(int64_t kv_item) const { return row(kv_item) + width_; }
  const float* v_scale(int64_t kv_item) const { return v_mean(kv_item) + value_width_; }
  const float* v_inverse(int64_t kv_item) const { return v_scale(kv_item) + value_width_; }

  // Granularity per_head only: the scale of all keys.
  Scale key_scale(int64_t kv_item) const { return key_scales_[kv_item]; }

 private:
  static constexpr int64_t kChunkTokens = 1024;

  float* row(int64_t kv_item) const { return of_keys_.at(kv_item * (width_ + 3 * value_width_)); }
  bool one_scale() const { return recipe_.granularity == Granularity::kPerHead; }

  // Sums of a chunk of blocks, then sums of chunks in their order: the same for any thread count.
  void reduce_keys() {
    const int64_t blocks_per_chunk = std::max<int64_t>(1, kChunkTokens / g_.kv.block_size);
    const int64_t chunks = ceil_div(g_.kv.blocks(), blocks_per_chunk);
    const int64_t items = g_.batch * g_.kv_heads;
    const int64_t k_floats = ChannelRange::floats(width_);
    const int64_t floats = k_floats + ChannelRange::floats(value_width_);
    const Buffer<float> store(items * chunks * floats);
    std::vector<int64_t> counts(items * chunks);
    const auto ranges = [&](int64_t task) {
      float* data = store.at(task * floats);
      return std::pair{ChannelRange(data, width_), ChannelRange(data + k_floats, value_width_)};
    };
    parallel_tasks(items * chunks, [&] {
      return [&, rows = Buffer<float>(kTile * std::max(width_, value_width_))](int64_t task) {
        const auto [k, v] = ranges(task);
        const int64_t first = task % chunks * blocks_per_chunk;
        const int64_t end = std::min(first + blocks_per_chunk, g_.kv.blocks());
        counts[task] = reduce_blocks(task / chunks, first, end, k, v, rows.data());
      };
    });
    parallel_tasks(items, [&] {
      return [&](int64_t item) {
        const auto [k, v] = ranges(item * chunks);
        int64_t count = counts[item * chunks];
        for (int64_t n = item * chunks + 1; n < (item + 1) * chunks; ++n) {
          const auto [more_k, more_v] = ranges(n);
          k.add(more_k);
          v.add(more_v);
          count += counts[n];
        }
        finish(item, k, v, count);
      };
    });
  }

  // Returns the number of valid tokens.
  int64_t reduce_blocks(int64_t kv_item, int64_t first, int64_t end, const ChannelRange& k,
                        const ChannelRange& v, float* rows) const {
    const int64_t batch = kv_item / g_.kv_heads, head = kv_item % g_.kv_heads;
    int64_t count = 0;
    k.clear();
    v.clear();
    for (int64_t block = first; block < end; ++block) {
      const int64_t length = g_.kv.at(batch, block), start = block * g_.kv.block_size;
      count += length;
      for (int64_t offset = 0; offset < length; offset += kTile) {
        const int64_t tokens = std::min(kTile, length - offset);
        if (recipe_.smooth_k || one_scale()) {
          load_float_rows<T>(a_.k, batch, head, start + offset, tokens, g_.head_dim,
                             recipe_.hadamard, rows, width_, tokens);
          if (recipe_.smooth_k) k.add_sums(rows, tokens);
          if (one_scale()) k.add_ends(rows, tokens);
        }
        load_float_rows<T>(a_.v, batch, head, start + offset, tokens, g_.value_dim, false, rows,
                           value_width_, tokens);
        if (recipe_.smooth_v) v.add_sums(rows, tokens);
        v.add_ends(rows, tokens);
      }
    }
    return count;
  }

  void finish(int64_t item, const ChannelRange& k, const ChannelRange& v, int64_t count) {
    float* k_mean = row(item);
    float *v_mean = k_mean + width_, *scale = v_mean + value_width_;
    float* inverse = scale + value_width_;
    std::fill_n(k_mean, width_ + 3 * value_width_, 0.0f);
    if (count == 0) return;
    const auto number = static_cast<float>(count);
    if (recipe_.smooth_k) {
      for (int64_t d = 0; d < g_.head_dim; ++d) k_mean[d] = k.sum[d] / number;
    }
    if (one_scale()) {
      float amax = 0.0f;
      for (int64_t d = 0; d < g_.head_dim; ++d) amax = max_or_nan(amax, k.amax(d, k_mean[d]));
      key_scales_[item] = scale_of(amax, recipe_.fp8_scores ? kE4m3Limit : kInt8Limit);
    }
    float head_amax = 0.0f;
    for (int64_t d = 0; d < g_.value_dim; ++d) {
      if (recipe_.smooth_v) v_mean[d] = v.sum[d] / number;
      scale[d] = v.amax(d, v_mean[d]);
      head_amax = max_or_nan(head_amax, scale[d]);
    }
    for (int64_t d = 0; d < g_.value_dim; ++d) {
      const float amax = one_scale() ? head_amax : scale[d];
      const Scale s = recipe_.fp8_values ? scale_of(amax, kE4m3Limit) : power_of_two_scale_of(amax);
      scale[d] = s.scale;
      inverse[d] = s.inverse;
    }
  }

  const ForwardArguments& a_;
  const Geometry& g_;
  const Recipe& recipe_;
  const int64_t width_, value_width_;
  Buffer<float> of_keys_;
  std::vector<Scale> key_scales_;
};

}  // namespace video_attn::cpu::CPU_CAPABILITY
