// Forward: for every tile of queries, over the listed keys, softmax(scale Q K^T) V. All products
// are made transposed, S^T = K Q^T and O^T = V^T P^T: queries are vector lanes, K is read as it
// lies, and the weights come out in the layout that the second product wants.

#include <algorithm>
#include <array>
#include <memory>

#include "cpu/kernels/key_panels.h"
#include "cpu/kernels/parallel.h"
#include "cpu/kernels/softmax.h"

namespace video_attn::cpu::CPU_CAPABILITY {
namespace {

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

// What one thread needs to compute tiles of queries.
template <typename T, typename C>
class TileWorker {
 public:
  TileWorker(const ForwardArguments& arguments, const KeyPanels<T, C>& panels)
      : a_(arguments),
        g_(arguments.geometry),
        panels_(panels),
        width_(row_width<C>(g_.head_dim)),
        value_width_(row_width<C>(g_.value_dim)),
        q_rows_(kTile * width_),
        q_transposed_(kTile * width_),
        scores_(kStepKeys * kTile),
        weights_(std::is_same_v<C, float> ? 0 : kStepKeys * kTile),
        out_transposed_(kTile * value_width_),
        out_rows_(kTile * value_width_) {}

  // Query rows [start, start + rows) of a block; those from `valid` on get 0 and -inf.
  void run(int64_t item, int64_t batch, int64_t head, int64_t block, int64_t start, int64_t rows,
           int64_t valid) {
    bool seen = false;
    if (valid > 0) {
      lanes_ = round_up(valid, kLaneGrain);
      load_queries(batch, head, start, valid);
      state_.reset();
      seen = over_keys(item, batch, head, block, start);
    }
    store(batch, head, start, rows, seen ? valid : 0);
  }

 private:
  void load_queries(int64_t batch, int64_t head, int64_t start, int64_t valid) {
    copy_rows(a_.q.at<const T>(batch, head, start), a_.q.row_stride, valid, g_.head_dim,
              q_rows_.data(), width_, lanes_);
    transpose_to_b(q_rows_.data(), width_, q_transposed_.data(), lanes_);
  }

  // Whether there was any key.
  bool over_keys(int64_t item, int64_t batch, int64_t head, int64_t block, int64_t start) {
    const ListRow list = g_.keys_of(batch, head, block);
    step_rows_ = segments_.count = 0;
    bool first_step = true;
    for (int64_t n = 0; n < list.count; ++n) {
      const int64_t kv_block = list[n], length = g_.kv.at(batch, kv_block);
      for (int64_t offset = 0; offset < length; offset += kTile) {
        const KeyPanel<C> panel = panels_.panel(item, kv_block, offset, length);
        if (step_rows_ + panel.padded_rows > kStepKeys) {
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

  void add_panel(const KeyPanel<C>& panel, int64_t first_key) {
    const int64_t inner = round_up(g_.head_dim, kPair<C>);
    multiply(panel.padded_rows, lanes_, inner, panel.keys, width_, q_transposed_.data(), lanes_,
             scores_.at(step_rows_ * lanes_), lanes_, false);
    segments_.items[segments_.count] = {step_rows_, panel.rows, step_rows_ + panel.padded_rows};
    step_panels_[segments_.count] = panel;
    step_keys_[segments_.count] = first_key;
    ++segments_.count;
    step_rows_ += panel.padded_rows;
  }

  void finish_step(int64_t start, bool first_step) {
    if (g_.is_causal) hide_future(start);
    C* weights = std::is_same_v<C, float> ? reinterpret_cast<C*>(scores_.data()) : weights_.data();
    softmax_step(segments_, lanes_, g_.scale * kLog2e, scores_.data(), weights, state_);
    if (!first_step) rescale();
    for (int64_t n = 0; n < segments_.count; ++n) {
      const KeyPanel<C>& panel = step_panels_[n];
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
        row_from_float(out_rows_.at(r * value_width_), out, g_.value_dim);
        lse = state_.maximum[r];
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
  const KeyPanels<T, C>& panels_;
  const int64_t width_, value_width_;
  Buffer<C> q_rows_, q_transposed_;
  Buffer<float> scores_;
  Buffer<C> weights_;
  Buffer<float> out_transposed_, out_rows_;
  int64_t lanes_ = 0, step_rows_ = 0;
  SegmentList segments_;
  std::array<KeyPanel<C>, kStepKeys / kRowGrain> step_panels_;
  std::array<int64_t, kStepKeys / kRowGrain> step_keys_;
  RunningSoftmax state_;
  ReleaseMatrixUnit<C> release_;
};

template <typename T, typename C>
void run(const ForwardArguments& arguments) {
  const Geometry& g = arguments.geometry;
  const int64_t tiles_per_block = ceil_div(std::min(g.q.block_size, g.q.length), kTile);
  const int64_t tiles = g.q.blocks() * tiles_per_block;
  const int64_t tasks_per_item = g.group() * tiles;
  const int64_t items = g.batch * g.kv_heads;
  // Few heads at a time: their packed keys and values stay in the cache, and memory stays small.
  const int64_t wanted = kTasksPerThread * at::get_num_threads();
  const int64_t items_per_pass = std::clamp<int64_t>(ceil_div(wanted, tasks_per_item), 1, items);
  KeyPanels<T, C> panels(arguments);
  for (int64_t first = 0; first < items; first += items_per_pass) {
    const int64_t count = std::min(items_per_pass, items - first);
    panels.pack(first, count);
    parallel_tasks(count * tasks_per_item, [&] {
      return [&, worker = std::make_unique<TileWorker<T, C>>(arguments, panels)](int64_t task) {
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

}  // namespace

void attention_forward(const ForwardArguments& arguments) {
  with_dtypes(arguments.geometry, [&]<typename T, typename C>() { run<T, C>(arguments); });
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
