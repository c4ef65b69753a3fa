// What the backward pass needs of the queries, packed once per call and query head: Q and dO in
// both orders, log-sum-exp and delta per row. Only blocks that see a key.
#pragma once

#include <vector>

#include "cpu/kernels/matrix.h"
#include "cpu/kernels/parallel.h"

namespace video_attn::cpu::CPU_CAPABILITY {

// Up to kTile valid queries of one block, as vector lanes. Padding is 0; the log-sum-exp of a lane
// that gets no gradient is +inf, which makes its weights 0.
template <typename C>
struct QueryPanel {
  int64_t slot, lanes;
  C *q_transposed, *grad_transposed;  // operands B: [D, lanes], [Dv, lanes]
  C *q, *grad;                        // operands B: [lanes, row_width(D)], [lanes, row_width(Dv)]
  float *lse_log2, *delta;
};

template <typename T, typename C>
class QueryPanels {
 public:
  explicit QueryPanels(const BackwardArguments& arguments)
      : a_(arguments),
        g_(arguments.geometry),
        width_(row_width<C>(g_.head_dim)),
        value_width_(row_width<C>(g_.value_dim)),
        lanes_(round_up(std::min({g_.q.block_size, g_.q.length, kTile}), kLaneGrain)) {}

  // Panels are numbered through; those of an item are [first_slot(item), first_slot(item + 1)).
  int64_t first_slot(int64_t item) const { return first_slots_[item]; }
  int64_t lanes() const { return lanes_; }

  // Packs the queries of key heads [first, first + count) that see a key.
  void pack(int64_t first, int64_t count) {
    std::vector<Use> uses;
    int64_t panels = 0;
    first_slots_.assign(1, 0);
    slots_.assign(count * g_.group() * g_.q.blocks(), -1);
    for (int64_t item = 0; item < count; ++item) {
      const int64_t batch = (first + item) / g_.kv_heads;
      for (int64_t n = 0; n < g_.group(); ++n) {
        const int64_t head = (first + item) % g_.kv_heads * g_.group() + n;
        int64_t* slots = slots_.data() + (item * g_.group() + n) * g_.q.blocks();
        mark_used(batch, head, slots);
        for (int64_t block = 0; block < g_.q.blocks(); ++block) {
          if (slots[block] < 0) continue;
          slots[block] = panels;
          uses.push_back({batch, head, block, panels});
          panels += ceil_div(g_.q.at(batch, block), kTile);
        }
      }
      first_slots_.push_back(panels);
    }
    store_.reserve(panels * panel_elements());
    scalars_.reserve(panels * 2 * lanes_);
    parallel_tasks(static_cast<int64_t>(uses.size()), [&] {
      return [&, rows = Buffer<C>(lanes_ * std::max(width_, value_width_)),
              row = Buffer<float>(2 * g_.value_dim)](int64_t task) {
        pack_block(uses[task], rows.data(), row.data());
      };
    });
  }

  // A block's first panel, or -1.
  int64_t slot(int64_t item, int64_t group_head, int64_t block) const {
    return slots_[(item * g_.group() + group_head) * g_.q.blocks() + block];
  }

  QueryPanel<C> panel(int64_t slot, int64_t valid) const {
    C* data = store_.at(slot * panel_elements());
    float* scalars = scalars_.at(slot * 2 * lanes_);
    const int64_t q_size = lanes_ * width_, grad_size = lanes_ * value_width_;
    return {slot,
            round_up(valid, kLaneGrain),
            data,
            data + q_size,
            data + q_size + grad_size,
            data + 2 * q_size + grad_size,
            scalars,
            scalars + lanes_};
  }

 private:
  struct Use {
    int64_t batch, head, block, slot;
  };

  int64_t panel_elements() const { return 2 * lanes_ * (width_ + value_width_); }

  // 0 in `slots` for every block with valid queries that see a key.
  void mark_used(int64_t batch, int64_t head, int64_t* slots) const {
    for (int64_t kv_block = 0; kv_block < g_.kv.blocks(); ++kv_block) {
      if (g_.kv.at(batch, kv_block) == 0) continue;
      const ListRow list = g_.queries_of(batch, head, kv_block);
      for (int64_t n = 0; n < list.count; ++n) slots[list[n]] = 0;
    }
    for (int64_t block = 0; block < g_.q.blocks(); ++block) {
      if (g_.q.at(batch, block) == 0) slots[block] = -1;
    }
  }

  void pack_block(const Use& use, C* rows, float* row) const {
    const int64_t length = g_.q.at(use.batch, use.block);
    for (int64_t offset = 0; offset < length; offset += kTile) {
      const int64_t start = use.block * g_.q.block_size + offset;
      const int64_t valid = std::min(kTile, length - offset);
      pack_panel(use, use.slot + offset / kTile, start, valid, rows, row);
    }
  }

  void pack_panel(const Use& use, int64_t slot, int64_t start, int64_t valid, C* rows,
                  float* row) const {
    const QueryPanel<C> p = panel(slot, valid);
    copy_rows(a_.q.at<const T>(use.batch, use.head, start), a_.q.row_stride, valid, g_.head_dim,
              rows, width_, p.lanes);
    transpose_to_b(rows, width_, p.q_transposed, p.lanes);
    pack_b(rows, width_, p.q, p.lanes);
    copy_rows(a_.grad_out.at<const T>(use.batch, use.head, start), a_.grad_out.row_stride, valid,
              g_.value_dim, rows, value_width_, p.lanes);
    transpose_to_b(rows, value_width_, p.grad_transposed, p.lanes);
    pack_b(rows, value_width_, p.grad, p.lanes);
    for (int64_t r = 0; r < p.lanes; ++r) {
      p.lse_log2[r] = kInfinity;
      p.delta[r] = 0.0f;
      if (r >= valid) continue;
      const float lse = a_.lse.at(use.batch, use.head, start + r);
      if (lse == -kInfinity) continue;
      p.lse_log2[r] = lse * kLog2e;
      p.delta[r] = delta(use, start + r, row);
    }
  }

  // sum(dO * O), less the gradient of the log-sum-exp: what every score gradient is short of.
  float delta(const Use& use, int64_t query, float* row) const {
    float *grad = row, *out = row + g_.value_dim;
    row_to_float(a_.grad_out.at<const T>(use.batch, use.head, query), grad, g_.value_dim);
    row_to_float(a_.out.at<const T>(use.batch, use.head, query), out, g_.value_dim);
    const float sum = at::vec::map2_reduce_all<float>([](Vec x, Vec y) { return x * y; },
                                                      [](Vec x, Vec y) { return x + y; }, grad, out,
                                                      g_.value_dim);
    return a_.grad_lse.data ? sum - a_.grad_lse.at(use.batch, use.head, query) : sum;
  }

  const BackwardArguments& a_;
  const Geometry& g_;
  const int64_t width_, value_width_, lanes_;
  std::vector<int64_t> first_slots_;  // of every item, and the end
  std::vector<int64_t> slots_;  // per item, head of its group and query block: first panel, or -1
  Buffer<C> store_;
  Buffer<float> scalars_;
};

}  // namespace video_attn::cpu::CPU_CAPABILITY
