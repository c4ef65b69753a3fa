// Keys and values of the blocks that some query sees, packed for the forward pass: once per call
// and key head, then read by every query tile. Blocks that nobody lists, and tokens past a block's
// length, are never read.
#pragma once

#include <utility>
#include <vector>

#include "cpu/kernels/matrix.h"
#include "cpu/kernels/parallel.h"

namespace video_attn::cpu::CPU_CAPABILITY {

// A Packing says what a panel of up to kTile keys of one block looks like:
//   Panel                   the panel as kernels see it, with at least `rows` and `padded_rows`
//   Packing(context)        made once per call
//   panel_bytes()           of every panel, a multiple of 64
//   view(data, rows)        the Panel of `rows` keys that lies at `data`
//   Scratch, scratch()      what one thread needs to pack
//   pack(batch, head, first_key, rows, data, scratch)
template <typename Packing>
class KeyPanels {
 public:
  using Panel = typename Packing::Panel;

  KeyPanels(const Geometry& geometry, Packing packing)
      : g_(geometry), packing_(std::move(packing)) {}

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
    store_.reserve(panels * packing_.panel_bytes());
    parallel_tasks(static_cast<int64_t>(uses.size()), [&] {
      return [&, scratch = packing_.scratch()](int64_t task) {
        pack_block(uses[task].kv_item, uses[task].block, uses[task].slot, scratch);
      };
    });
  }

  // The panel that starts `offset` tokens into a block of `length` valid tokens.
  Panel panel(int64_t item, int64_t block, int64_t offset, int64_t length) const {
    const int64_t slot = slots_[item * g_.kv.blocks() + block];
    return packing_.view(panel_data(slot, offset), std::min(kTile, length - offset));
  }

 private:
  char* panel_data(int64_t slot, int64_t offset) const {
    return store_.at((slot + offset / kTile) * packing_.panel_bytes());
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

  void pack_block(int64_t kv_item, int64_t block, int64_t slot,
                  const typename Packing::Scratch& scratch) const {
    const int64_t batch = kv_item / g_.kv_heads, head = kv_item % g_.kv_heads;
    const int64_t length = g_.kv.at(batch, block);
    for (int64_t offset = 0; offset < length; offset += kTile) {
      packing_.pack(batch, head, block * g_.kv.block_size + offset,
                    std::min(kTile, length - offset), panel_data(slot, offset), scratch);
    }
  }

  const Geometry& g_;
  const Packing packing_;
  std::vector<int64_t> slots_;  // per item and key block: its first panel, or -1
  Buffer<char> store_;
};

}  // namespace video_attn::cpu::CPU_CAPABILITY
