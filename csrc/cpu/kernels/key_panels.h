// Keys and values of the blocks that some query sees, packed for the forward pass: once per call
// and key head, then read by every query tile. Blocks that nobody lists, and tokens past a block's
// length, are never read.
#pragma once

#include <vector>

#include "cpu/kernels/matrix.h"
#include "cpu/kernels/parallel.h"

namespace video_attn::cpu::CPU_CAPABILITY {

// Up to kTile keys of one block. Padding is 0.
template <typename C>
struct KeyPanel {
  const C* keys;    // [padded_rows, row_width(D)]
  const C* values;  // transposed: [Dv, values_ld]
  int64_t values_ld;
  int64_t rows, padded_rows;
};

template <typename T, typename C>
class KeyPanels {
 public:
  explicit KeyPanels(const ForwardArguments& arguments)
      : a_(arguments),
        g_(arguments.geometry),
        width_(row_width<C>(g_.head_dim)),
        value_width_(row_width<C>(g_.value_dim)),
        panel_rows_(round_up(std::min({g_.kv.block_size, g_.kv.length, kTile}), kLaneGrain)) {}

  // Packs what the queries of key heads [first, first + count) see; key heads are counted over all
  // batch entries.
  void pack(int64_t first, int64_t count) {
    struct Use {
      int64_t kv_item, block, slot;
    };
    std::vector<Use> uses;
    int64_t panels = 0;
    slots_.assign(count * g_.kv.blocks(), -1);
    for (int64_t item = 0; item < count; ++item) {
      int64_t* slots = slots_.data() + item * g_.kv.blocks();
      mark_used(first + item, slots);
      for (int64_t block = 0; block < g_.kv.blocks(); ++block) {
        if (slots[block] < 0) continue;
        slots[block] = panels;
        uses.push_back({first + item, block, panels});
        panels += ceil_div(g_.kv.at((first + item) / g_.kv_heads, block), kTile);
      }
    }
    store_.reserve(panels * panel_elements());
    parallel_tasks(static_cast<int64_t>(uses.size()), [&] {
      return [&, rows = Buffer<C>(kTile * value_width_)](int64_t task) {
        pack_block(uses[task].kv_item, uses[task].block, uses[task].slot, rows.data());
      };
    });
  }

  // The panel that starts `offset` tokens into a block of `length` valid tokens.
  KeyPanel<C> panel(int64_t item, int64_t block, int64_t offset, int64_t length) const {
    const int64_t rows = std::min(kTile, length - offset);
    C* keys = panel_data(slots_[item * g_.kv.blocks() + block], offset);
    return {keys, keys + panel_rows_ * width_, round_up(rows, kLaneGrain), rows,
            round_up(rows, kRowGrain)};
  }

 private:
  int64_t panel_elements() const { return panel_rows_ * (width_ + value_width_); }

  C* panel_data(int64_t slot, int64_t offset) const {
    return store_.at((slot + offset / kTile) * panel_elements());
  }

  // 0 in `slots` for every block with tokens that a valid query lists.
  void mark_used(int64_t kv_item, int64_t* slots) const {
    const int64_t batch = kv_item / g_.kv_heads, kv_head = kv_item % g_.kv_heads;
    for (int64_t head = kv_head * g_.group(); head < (kv_head + 1) * g_.group(); ++head) {
      for (int64_t q_block = 0; q_block < g_.q.blocks(); ++q_block) {
        if (g_.q.at(batch, q_block) == 0) continue;
        const ListRow list = g_.keys_of(batch, head, q_block);
        for (int64_t n = 0; n < list.count; ++n) slots[list[n]] = 0;
      }
    }
    for (int64_t block = 0; block < g_.kv.blocks(); ++block) {
      if (g_.kv.at(batch, block) == 0) slots[block] = -1;
    }
  }

  void pack_block(int64_t kv_item, int64_t block, int64_t slot, C* value_rows) const {
    const int64_t batch = kv_item / g_.kv_heads, head = kv_item % g_.kv_heads;
    const int64_t length = g_.kv.at(batch, block);
    for (int64_t offset = 0; offset < length; offset += kTile) {
      const int64_t token = block * g_.kv.block_size + offset;
      const int64_t rows = std::min(kTile, length - offset);
      const int64_t padded = round_up(rows, kLaneGrain);
      C* keys = panel_data(slot, offset);
      copy_rows(a_.k.at<const T>(batch, head, token), a_.k.row_stride, rows, g_.head_dim, keys,
                width_, padded);
      copy_rows(a_.v.at<const T>(batch, head, token), a_.v.row_stride, rows, g_.value_dim,
                value_rows, value_width_, padded);
      transpose_to_a(value_rows, value_width_, keys + panel_rows_ * width_, padded);
    }
  }

  const ForwardArguments& a_;
  const Geometry& g_;
  const int64_t width_, value_width_, panel_rows_;
  std::vector<int64_t> slots_;  // per item and key block: its first panel, or -1
  Buffer<C> store_;
};

}  // namespace video_attn::cpu::CPU_CAPABILITY
