// Operands of the forward pass in a quantized precision: queries as they are quantized, panels of
// key and value codes, and what all threads of a call share.
#pragma once

#include <vector>

#include "cpu/kernels/codes.h"
#include "cpu/kernels/parallel.h"
#include "cpu/kernels/statistics.h"

namespace video_attn::cpu::CPU_CAPABILITY {

// A tile of queries in fp32, as it is quantized: rotated, and without its mean (smooth_q).
template <typename T>
class QueryRows {
 public:
  explicit QueryRows(const QuantizedArguments& arguments)
      : a_(arguments.forward),
        g_(arguments.forward.geometry),
        recipe_(arguments.recipe),
        width_(round_up(g_.head_dim, kLaneGrain)),
        rows_(kTile * width_),
        mean_(width_) {}

  void load(int64_t batch, int64_t head, int64_t start, int64_t valid) {
    load_float_rows<T>(a_.q, batch, head, start, valid, g_.head_dim, recipe_.hadamard, rows_.data(),
                       width_, valid);
  }

  void smooth(int64_t valid) {
    if (!recipe_.smooth_q) return;
    const Vec share(static_cast<float>(valid));
    for (int64_t i = 0; i < width_; i += Vec::size()) {
      Vec sum(0.0f);
      for (int64_t r = 0; r < valid; ++r) sum = sum + Vec::loadu(row(r) + i);
      (sum / share).store(mean_.at(i));
    }
    for (int64_t r = 0; r < valid; ++r) subtract_row(row(r), mean_.data(), width_);
  }

  float* row(int64_t r) const { return rows_.at(r * width_); }
  const float* mean() const { return mean_.data(); }
  int64_t width() const { return width_; }

 private:
  const ForwardArguments& a_;
  const Geometry& g_;
  const Recipe& recipe_;
  const int64_t width_;
  Buffer<float> rows_, mean_;
};

// What all threads of a call share.
template <typename T>
struct QuantizedContext {
  explicit QuantizedContext(const QuantizedArguments& arguments)
      : arguments(arguments), statistics(arguments) {
    if (arguments.recipe.granularity == Granularity::kPerHead) reduce_queries();
  }

  const Geometry& geometry() const { return arguments.forward.geometry; }
  float score_limit() const { return arguments.recipe.fp8_scores ? kE4m3Limit : kInt8Limit; }
  int64_t kv_item(int64_t batch, int64_t q_head) const {
    return batch * geometry().kv_heads + q_head / geometry().group();
  }

  const QuantizedArguments& arguments;
  const Statistics<T> statistics;
  std::vector<Scale> query_scales;  // of every (batch, query head), granularity per_head only

 private:
  void reduce_queries() {
    const Geometry& g = geometry();
    query_scales.resize(g.batch * g.q_heads);
    parallel_tasks(g.batch * g.q_heads, [&] {
      return [&, queries = QueryRows<T>(arguments)](int64_t task) mutable {
        const int64_t batch = task / g.q_heads, head = task % g.q_heads;
        Vec amax(0.0f);
        for (int64_t block = 0; block < g.q.blocks(); ++block) {
          const int64_t length = g.q.at(batch, block);
          for (int64_t offset = 0; offset < length; offset += kTile) {
            const int64_t valid = std::min(kTile, length - offset);
            queries.load(batch, head, block * g.q.block_size + offset, valid);
            queries.smooth(valid);
            for (int64_t r = 0; r < valid; ++r) {
              amax = amax_lanes(amax, queries.row(r), queries.width());
            }
          }
        }
        query_scales[task] = scale_of(amax_of_lanes(amax), score_limit());
      };
    });
  }
};

// Panels of key codes and transposed value codes, with a scale per key.
template <typename T, typename Key, typename C>
class QuantizedPacking {
 public:
  struct Panel {
    const Key* keys;  // [padded_rows, row_width(D)]
    const C* values;  // transposed: [Dv, values_ld]
    int64_t values_ld;
    int64_t rows, padded_rows;
    const float* scales;      // [rows]
    const float* float_keys;  // smooth_q only: what the key codes stand for, [rows, fp32 width]
  };
  struct Scratch {
    Buffer<float> rows;
    Buffer<C> values;
  };

  explicit QuantizedPacking(const QuantizedContext<T>& context)
      : context_(context),
        a_(context.arguments.forward),
        g_(context.geometry()),
        recipe_(context.arguments.recipe),
        width_(row_width<Key>(g_.head_dim)),
        value_width_(row_width<C>(g_.value_dim)),
        float_width_(round_up(g_.head_dim, kLaneGrain)),
        panel_rows_(round_up(std::min({g_.kv.block_size, g_.kv.length, kTile}), kLaneGrain)),
        key_bytes_(panel_rows_ * width_ * sizeof(Key)),
        value_bytes_(panel_rows_ * value_width_ * sizeof(C)),
        float_bytes_(recipe_.smooth_q ? panel_rows_ * float_width_ * sizeof(float) : 0) {}

  int64_t panel_bytes() const {
    return key_bytes_ + value_bytes_ + float_bytes_ + panel_rows_ * sizeof(float);
  }

  Panel view(char* data, int64_t rows) const {
    return {reinterpret_cast<const Key*>(data),
            reinterpret_cast<const C*>(data + key_bytes_),
            round_up(rows, kLaneGrain),
            rows,
            round_up(rows, kRowGrain),
            reinterpret_cast<const float*>(data + key_bytes_ + value_bytes_ + float_bytes_),
            reinterpret_cast<const float*>(data + key_bytes_ + value_bytes_)};
  }

  Scratch scratch() const {
    return {Buffer<float>(kTile * std::max({width_, value_width_, float_width_})),
            Buffer<C>(kTile * value_width_)};
  }

  void pack(int64_t batch, int64_t head, int64_t first_key, int64_t rows, char* data,
            const Scratch& scratch) const {
    pack_keys(batch, head, first_key, rows, data, scratch.rows.data());
    pack_values(batch, head, first_key, rows, data, scratch);
  }

 private:
  void pack_keys(int64_t batch, int64_t head, int64_t first_key, int64_t rows, char* data,
                 float* x) const {
    const int64_t item = batch * g_.kv_heads + head;
    load_float_rows<T>(a_.k, batch, head, first_key, rows, g_.head_dim, recipe_.hadamard, x, width_,
                       round_up(rows, kLaneGrain));
    if (recipe_.smooth_k) {
      const float* mean = context_.statistics.k_mean(item);
      for (int64_t r = 0; r < rows; ++r) subtract_row(x + r * width_, mean, float_width_);
    }
    const auto group = [&](int64_t r) { return key_group(recipe_.granularity, r); };
    std::array<Scale, kMaxGroups> scales;
    const float limit = context_.score_limit();
    if (recipe_.granularity == Granularity::kPerHead) {
      scales[0] = context_.statistics.key_scale(item);
    } else {
      scales = scales_of_groups(x, width_, rows, limit, group);
    }
    const Panel panel = view(data, rows);
    auto* row_scales = const_cast<float*>(panel.scales);
    auto* keys = reinterpret_cast<Key*>(data);
    if (recipe_.smooth_q) copy_float_keys(x, rows, const_cast<float*>(panel.float_keys));
    for (int64_t r = 0; r < rows; ++r) {
      row_scales[r] = scales[group(r)].scale;
      encode_row(x + r * width_, Vec(scales[group(r)].inverse), limit);
    }
    for (int64_t r = 0; r < panel.values_ld; ++r) {
      store_codes(x + r * width_, keys + r * width_, width_);
    }
  }

  void encode_row(float* row, Vec inverse, float limit) const {
    for (int64_t i = 0; i < float_width_; i += Vec::size()) {
      code_of(Vec::loadu(row + i), inverse, limit).store(row + i);
    }
  }

  void copy_float_keys(const float* x, int64_t rows, float* target) const {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(x + r * width_, float_width_, target + r * float_width_);
    }
  }

  void pack_values(int64_t batch, int64_t head, int64_t first_key, int64_t rows, char* data,
                   const Scratch& scratch) const {
    const int64_t item = batch * g_.kv_heads + head, padded = round_up(rows, kLaneGrain);
    const float* mean = context_.statistics.v_mean(item);
    const float* inverse = context_.statistics.v_inverse(item);
    float* x = scratch.rows.data();
    load_float_rows<T>(a_.v, batch, head, first_key, rows, g_.value_dim, false, x, value_width_,
                       padded);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = x + r * value_width_;
      for (int64_t i = 0; i < round_up(g_.value_dim, kLaneGrain); i += Vec::size()) {
        const Vec centred = Vec::loadu(row + i) - Vec::loadu(mean + i);
        value_code(centred, Vec::loadu(inverse + i)).store(row + i);
      }
    }
    for (int64_t r = 0; r < padded; ++r) {
      store_codes(x + r * value_width_, scratch.values.at(r * value_width_), value_width_);
    }
    transpose_to_a(scratch.values.data(), value_width_, reinterpret_cast<C*>(data + key_bytes_),
                   padded);
  }

  Vec value_code(Vec x, Vec inverse) const {
    if (recipe_.fp8_values) return code_of(x, inverse, kE4m3Limit);
    const Vec scaled = x * inverse;
    return round_to_half(Vec::blendv(scaled, Vec(0.0f), scaled != scaled));
  }

  const QuantizedContext<T>& context_;
  const ForwardArguments& a_;
  const Geometry& g_;
  const Recipe& recipe_;
  const int64_t width_, value_width_, float_width_, panel_rows_;
  const int64_t key_bytes_, value_bytes_, float_bytes_;
};

}  // namespace video_attn::cpu::CPU_CAPABILITY
