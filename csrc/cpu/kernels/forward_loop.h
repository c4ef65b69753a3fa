// The loop of the forward pass: for every tile of queries, over the listed keys, softmax(scale Q
// K^T) V. All products are made transposed, S^T = K Q^T and O^T = V^T P^T: queries are vector
// lanes, K is read as it lies, and the weights come out in the layout that the second product
// wants.
//
// What is multiplied with what is the business of a Math:
//   Packing, Context              keys and values as KeyPanels<Packing>; what all threads share
//   Weight, Rounding              weights as operand, and how they are rounded (softmax.h)
//   kStepPanels                   panels per softmax step, at most
//   Math(context)                 made once per thread
//   load_queries(batch, head, start, valid, lanes)
//   scores(panel, lanes, target)  fp32 [padded_rows, lanes]
//   score_scale()                 what the scores are still to be multiplied with (base 2)
//   finish_row(row, lse)          last touch to an output row whose log-sum-exp is lse, in place
//   finish_lse(r, lse)            and to the log-sum-exp of query r
#pragma once

#include <algorithm>
#include <array>
#include <memory>

#include "cpu/kernels/key_panels.h"
#include "cpu/kernels/parallel.h"
#include "cpu/kernels/softmax.h"

namespace video_attn::cpu::CPU_CAPABILITY {

// Keys per softmax step: enough to make rescaling cheap, few enough for the L2 cache.
constexpr int64_t kStepKeys = 256;

// Tasks per thread and pass over heads: bounds what an uneven end costs.
constexpr int64_t kTasksPerThread = 32;

struct SegmentList {
  std::array<RowSegment, kStepKeys / kRowGrain> items;
  int64_t count = 0;

  const RowSegment* begin() const { return items.data(); }
  const RowSegment* end() const { return items.data() + count; }
};

// What one thread needs to compute tiles of queries; T is the dtype of the output.
template <typename T, typename Math>
class TileWorker {
 public:
  using Panels = KeyPanels<typename Math::Packing>;
  using Weight = typename Math::Weight;

  TileWorker(const ForwardArguments& arguments, const typename Math::Context& context,
             const Panels& panels)
      : a_(arguments),
        g_(arguments.geometry),
        panels_(panels),
        math_(context),
        value_width_(row_width<Weight>(g_.value_dim)),
        scores_(kStepKeys * kTile),
        weights_(std::is_same_v<Weight, float> ? 0 : kStepKeys * kTile),
        out_transposed_(kTile * value_width_),
        out_rows_(kTile * value_width_) {}

  // Query rows [start, start + rows) of a block; those from `valid` on get 0 and -inf.
  void run(int64_t item, int64_t batch, int64_t head, int64_t block, int64_t start, int64_t rows,
           int64_t valid) {
    bool seen = false;
    if (valid > 0) {
      lanes_ = round_up(valid, kLaneGrain);
      math_.load_queries(batch, head, start, valid, lanes_);
      state_.reset();
      seen = over_keys(item, batch, head, block, start);
    }
    store(batch, head, start, rows, seen ? valid : 0);
  }

 private:
  // Whether there was any key.
  bool over_keys(int64_t item, int64_t batch, int64_t head, int64_t block, int64_t start) {
    const ListRow list = g_.keys_of(batch, head, block);
    step_rows_ = segments_.count = 0;
    bool first_step = true;
    for (int64_t n = 0; n < list.count; ++n) {
      const int64_t kv_block = list[n], length = g_.kv.at(batch, kv_block);
      for (int64_t offset = 0; offset < length; offset += kTile) {
        const auto panel = panels_.panel(item, kv_block, offset, length);
        if (step_rows_ + panel.padded_rows > kStepKeys || segments_.count == Math::kStepPanels) {
          finish_step(start, first_step);
          first_step = false;
        }
        add_panel(panel, kv_block * g_.kv.block_size + offset);
      }
    }
    if (step_rows_ == 0) return !first_step;
    finish_step(start, first_step);
    return true;
  }

  void add_panel(const typename Panels::Panel& panel, int64_t first_key) {
    math_.scores(panel, lanes_, scores_.at(step_rows_ * lanes_));
    segments_.items[segments_.count] = {step_rows_, panel.rows, step_rows_ + panel.padded_rows};
    step_panels_[segments_.count] = panel;
    step_keys_[segments_.count] = first_key;
    ++segments_.count;
    step_rows_ += panel.padded_rows;
  }

  void finish_step(int64_t start, bool first_step) {
    if (g_.is_causal) hide_future(start);
    Weight* weights = weights_.data();
    if constexpr (std::is_same_v<Weight, float>) weights = scores_.data();
    softmax_step<typename Math::Rounding>(segments_, lanes_, math_.score_scale(), scores_.data(),
                                          weights, state_);
    if (!first_step) rescale();
    for (int64_t n = 0; n < segments_.count; ++n) {
      const auto& panel = step_panels_[n];
      multiply(g_.value_dim, lanes_, panel.padded_rows, panel.values, panel.values_ld,
               weights + segments_.items[n].first * lanes_, lanes_, out_transposed_.data(), lanes_,
               !first_step || n > 0);
    }
    step_rows_ = segments_.count = 0;
  }

  // Scores of keys after the last one a query may see become -inf.
  void hide_future(int64_t start) {
    for (int64_t n = 0; n < segments_.count; ++n) {
      for (int64_t r = 0; r < segments_.items[n].valid; ++r) {
        const int64_t first_seeing = step_keys_[n] + r - g_.causal_offset() - start;
        float* row = scores_.at((segments_.items[n].first + r) * lanes_);
        std::fill_n(row, std::clamp<int64_t>(first_seeing, 0, lanes_), -kInfinity);
      }
    }
  }

  void rescale() {
    for (int64_t lane = 0; lane < lanes_; lane += Vec::size()) {
      const Vec correction = Vec::loadu(state_.correction + lane);
      if (at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::minimum(x, y); },
                                         correction) == 1.0f) {
        continue;  // no maximum moved
      }
      for (int64_t d = 0; d < g_.value_dim; ++d) {
        float* p = out_transposed_.at(d * lanes_ + lane);
        (Vec::loadu(p) * correction).store(p);
      }
    }
  }

  void store(int64_t batch, int64_t head, int64_t start, int64_t rows, int64_t valid) {
    if (valid > 0) normalise();
    for (int64_t r = 0; r < rows; ++r) {
      T* out = a_.out.at<T>(batch, head, start + r);
      float& lse = a_.lse.at(batch, head, start + r);
      if (r < valid) {
        float* row = out_rows_.at(r * value_width_);
        math_.finish_row(row, state_.maximum[r]);
        row_from_float(row, out, g_.value_dim);
        lse = math_.finish_lse(r, state_.maximum[r]);
      } else {
        std::fill_n(out, g_.value_dim, T(0.0f));
        lse = -kInfinity;
      }
    }
  }

  // O / sum, as rows; the maximum becomes the log-sum-exp.
  void normalise() {
    for (int64_t lane = 0; lane < lanes_; lane += Vec::size()) {
      const Vec sum = Vec::loadu(state_.sum + lane), maximum = Vec::loadu(state_.maximum + lane);
      // Without any key in sight the sum is 0, and so is the output.
      const Vec inverse = Vec::blendv(Vec(1.0f) / sum, Vec(0.0f), sum == Vec(0.0f));
      at::vec::fmadd(maximum, Vec(kLn2), sum.log()).store(state_.maximum + lane);
      for (int64_t d = 0; d < g_.value_dim; ++d) {
        float* p = out_transposed_.at(d * lanes_ + lane);
        (Vec::loadu(p) * inverse).store(p);
      }
    }
    transpose_words(out_transposed_.data(), lanes_, out_rows_.data(), value_width_,
                    round_up(g_.value_dim, kLaneGrain), lanes_);
  }

  const ForwardArguments& a_;
  const Geometry& g_;
  const Panels& panels_;
  Math math_;
  const int64_t value_width_;
  Buffer<float> scores_;
  Buffer<Weight> weights_;
  Buffer<float> out_transposed_, out_rows_;
  int64_t lanes_ = 0, step_rows_ = 0;
  SegmentList segments_;
  std::array<typename Panels::Panel, kStepKeys / kRowGrain> step_panels_;
  std::array<int64_t, kStepKeys / kRowGrain> step_keys_;
  RunningSoftmax state_;
  ReleaseMatrixUnit<Weight> release_;
};

// All tiles of queries of one call.
template <typename T, typename Math>
void run_forward(const ForwardArguments& arguments, const typename Math::Context& context) {
  const Geometry& g = arguments.geometry;
  const int64_t tiles_per_block = ceil_div(std::min(g.q.block_size, g.q.length), kTile);
  const int64_t tiles = g.q.blocks() * tiles_per_block;
  const int64_t tasks_per_item = g.group() * tiles;
  const int64_t items = g.batch * g.kv_heads;
  // Few heads at a time: their packed keys and values stay in the cache, and memory stays small.
  const int64_t wanted = kTasksPerThread * at::get_num_threads();
  const int64_t items_per_pass = std::clamp<int64_t>(ceil_div(wanted, tasks_per_item), 1, items);
  KeyPanels<typename Math::Packing> panels(g, typename Math::Packing(context));
  for (int64_t first = 0; first < items; first += items_per_pass) {
    const int64_t count = std::min(items_per_pass, items - first);
    panels.pack(first, count);
    parallel_tasks(count * tasks_per_item, [&] {
      return [&, worker = std::make_unique<TileWorker<T, Math>>(arguments, context, panels)](
                 int64_t task) {
        const int64_t item = task / tasks_per_item, tile = task % tasks_per_item / g.group();
        const int64_t batch = (first + item) / g.kv_heads;
        const int64_t head = (first + item) % g.kv_heads * g.group() + task % g.group();
        const int64_t block = tile / tiles_per_block;
        const int64_t offset = tile % tiles_per_block * kTile;
        const int64_t start = block * g.q.block_size + offset;
        const int64_t rows = std::min({kTile, g.q.block_size - offset, g.q.length - start});
        if (rows <= 0) return;
        const int64_t valid = std::clamp<int64_t>(g.q.at(batch, block) - offset, 0, rows);
        worker->run(item, batch, head, block, start, rows, valid);
      };
    });
  }
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
