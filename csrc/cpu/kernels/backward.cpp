// Backward: for every tile of keys, over the queries that see it. S^T = K Q^T and dP^T = V dO^T are
// made again; then dV += P^T dO, dK += dS^T Q and dQ^T += K^T dS^T. Five products per pair.
//
// Whoever owns a tile of keys owns its dK and dV. dQ is shared by all tiles of a head, so the keys
// of a head are cut into chunks, each chunk sums its own dQ, and these sums are added in the order
// of the chunks: the result does not depend on timing.

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "cpu/kernels/query_panels.h"

namespace video_attn::cpu::CPU_CAPABILITY {
namespace {

// How one pass over some (batch, key head) items is cut.
struct Plan {
  int64_t items, chunks;
};

// A task for every thread, out of as few heads as possible: the queries of the heads at work share
// the cache. Chunks of many blocks can be cut to about equal work; small ones are better than idle
// threads.
Plan plan_pass(int64_t heads_left, int64_t kv_blocks, int64_t threads) {
  constexpr int64_t kMaxChunks = 16;
  Plan best{};
  double best_share = 0.0;  // of the threads' time that is used
  for (const int64_t blocks_per_chunk : {8, 2}) {
    const int64_t most = std::clamp<int64_t>(kv_blocks / blocks_per_chunk, 1, kMaxChunks);
    for (int64_t chunks = std::min(most, threads); chunks >= 1; --chunks) {
      const int64_t items = std::min(heads_left, ceil_div(threads, chunks));
      const int64_t rounds = ceil_div(items * chunks, threads);
      const double share =
          static_cast<double>(items * chunks) / static_cast<double>(rounds * threads);
      if (share > 1.02 * best_share) {
        best = {items, chunks};
        best_share = share;
      }
    }
    if (best_share > 0.75) break;
  }
  return best;
}

// dQ^T of one chunk: fp32 [D, lanes] for every query panel of its item.
class QueryGradients {
 public:
  QueryGradients() = default;
  QueryGradients(int64_t first_slot, int64_t slots, int64_t panel_size)
      : first_slot_(first_slot),
        panel_size_(panel_size),
        store_(slots * panel_size),
        written_(slots, 0) {}

  float* panel(int64_t slot) const { return store_.at((slot - first_slot_) * panel_size_); }
  bool written(int64_t slot) const { return written_[slot - first_slot_] != 0; }
  void set_written(int64_t slot) { written_[slot - first_slot_] = 1; }

 private:
  int64_t first_slot_ = 0, panel_size_ = 0;
  Buffer<float> store_;
  std::vector<uint8_t> written_;
};

template <typename T, typename C>
class KeyWorker {
 public:
  KeyWorker(const BackwardArguments& arguments, const QueryPanels<T, C>& queries)
      : a_(arguments),
        g_(arguments.geometry),
        queries_(queries),
        width_(row_width<C>(g_.head_dim)),
        value_width_(row_width<C>(g_.value_dim)),
        keys_(kTile * width_),
        keys_transposed_(kTile * width_),
        values_(kTile * value_width_),
        scores_(kTile * kTile),
        score_grads_(kTile * kTile),
        weights_(kTile * kTile),
        ds_(kTile * kTile),
        ds_pairs_(kPair<C> == 1 ? 0 : kTile * kTile),
        dk_(kTile * width_),
        dv_(kTile * value_width_) {}

  // All of one key block: gradients of its keys and values, and its share of dQ.
  void run_block(int64_t item, int64_t batch, int64_t kv_head, int64_t block,
                 QueryGradients& query_grads) {
    const int64_t length = g_.kv.at(batch, block);
    const int64_t start = block * g_.kv.block_size;
    const int64_t rows = std::min(g_.kv.block_size, g_.kv.length - start);
    for (int64_t offset = 0; offset < rows; offset += kTile) {
      const int64_t tile_rows = std::min(kTile, rows - offset);
      valid_ = std::clamp<int64_t>(length - offset, 0, tile_rows);
      first_key_ = start + offset;
      bool seen = false;
      if (valid_ > 0) seen = over_queries(item, batch, kv_head, block, query_grads);
      store(batch, kv_head, tile_rows, seen);
    }
  }

 private:
  // Whether there was any query.
  bool over_queries(int64_t item, int64_t batch, int64_t kv_head, int64_t block,
                    QueryGradients& query_grads) {
    bool seen = false;
    for (int64_t n = 0; n < g_.group(); ++n) {
      const ListRow list = g_.queries_of(batch, kv_head * g_.group() + n, block);
      for (int64_t i = 0; i < list.count; ++i) {
        const int64_t q_block = list[i];
        const int64_t slot = queries_.slot(item, n, q_block), length = g_.q.at(batch, q_block);
        if (slot < 0) continue;
        for (int64_t offset = 0; offset < length; offset += kTile) {
          const int64_t first_query = q_block * g_.q.block_size + offset;
          const int64_t valid = std::min(kTile, length - offset);
          if (g_.is_causal && first_query + valid - 1 + g_.causal_offset() < first_key_) continue;
          if (!seen) load_keys(batch, kv_head);
          one_pair(queries_.panel(slot + offset / kTile, valid), first_query, !seen, query_grads);
          seen = true;
        }
      }
    }
    return seen;
  }

  void load_keys(int64_t batch, int64_t kv_head) {
    const int64_t padded = round_up(valid_, kLaneGrain);
    copy_rows(a_.k.at<const T>(batch, kv_head, first_key_), a_.k.row_stride, valid_, g_.head_dim,
              keys_.data(), width_, padded);
    transpose_to_a(keys_.data(), width_, keys_transposed_.data(), padded);
    copy_rows(a_.v.at<const T>(batch, kv_head, first_key_), a_.v.row_stride, valid_, g_.value_dim,
              values_.data(), value_width_, padded);
    padded_ = round_up(valid_, kRowGrain);
  }

  void one_pair(const QueryPanel<C>& q, int64_t first_query, bool first, QueryGradients& grads) {
    const int64_t inner = round_up(g_.head_dim, kPair<C>);
    const int64_t value_inner = round_up(g_.value_dim, kPair<C>);
    const int64_t lanes = q.lanes;
    multiply(padded_, lanes, inner, keys_.data(), width_, q.q_transposed, lanes, scores_.data(),
             lanes, false);
    multiply(padded_, lanes, value_inner, values_.data(), value_width_, q.grad_transposed, lanes,
             score_grads_.data(), lanes, false);
    for (int64_t r = 0; r < valid_; r += kPair<C>) differentiate_rows(r, q, first_query);
    clear_padding(lanes);
    multiply(padded_, g_.value_dim, lanes, weights_.data(), lanes, q.grad, value_width_, dv_.data(),
             value_width_, !first);
    multiply(padded_, g_.head_dim, lanes, ds_.data(), lanes, q.q, width_, dk_.data(), width_,
             !first);
    const C* pairs = std::is_same_v<C, float> ? ds_.data() : ds_pairs_.data();
    multiply(g_.head_dim, lanes, padded_, keys_transposed_.data(), round_up(valid_, kLaneGrain),
             pairs, lanes, grads.panel(q.slot), lanes, grads.written(q.slot));
    grads.set_written(q.slot);
  }

  // P = 2^(scale S - lse) and dS = P (dP - delta) of key rows r (and r + 1, where pairs are
  // interleaved). The factor `scale` of dS is put on the sums at the end.
  void differentiate_rows(int64_t r, const QueryPanel<C>& q, int64_t first_query) {
    const Vec scale(g_.scale * kLog2e);
    const int64_t lanes = q.lanes;
    if (g_.is_causal) {
      for (int64_t n = r; n < std::min(r + kPair<C>, valid_); ++n) hide_past(n, lanes, first_query);
    }
    const auto vectors = [&](int64_t row, int64_t lane) {
      const Vec s = Vec::loadu(scores_.at(row * lanes + lane));
      const Vec p = exp2(at::vec::fmsub(s, scale, Vec::loadu(q.lse_log2 + lane)));
      const Vec dp = Vec::loadu(score_grads_.at(row * lanes + lane));
      return std::array<Vec, 2>{p, p * (dp - Vec::loadu(q.delta + lane))};
    };
    if constexpr (std::is_same_v<C, float>) {
      for (int64_t lane = 0; lane < lanes; lane += Vec::size()) {
        const auto [p, ds] = vectors(r, lane);
        p.store(weights_.at(r * lanes + lane));
        ds.store(ds_.at(r * lanes + lane));
      }
    } else {
      const std::array<Vec, 2> zero{Vec(0.0f), Vec(0.0f)};
      for (int64_t lane = 0; lane < lanes; lane += Vec::size()) {
        const auto even = vectors(r, lane);
        const auto odd = r + 1 < valid_ ? vectors(r + 1, lane) : zero;
        store_half(even[0], weights_.at(r * lanes + lane));
        store_half(odd[0], weights_.at((r + 1) * lanes + lane));
        store_half(even[1], ds_.at(r * lanes + lane));
        store_half(odd[1], ds_.at((r + 1) * lanes + lane));
        interleave_bf16(even[1], odd[1]).store(ds_pairs_.at(r * lanes + 2 * lane));
      }
    }
  }

  static void store_half(Vec x, C* target) {
    at::vec::convert_from_float<C>(x, x).store(target, Vec::size());
  }

  // Queries before the first one that may see key row r: score -inf, so weight 0.
  void hide_past(int64_t r, int64_t lanes, int64_t first_query) {
    const int64_t first_seeing = first_key_ + r - g_.causal_offset() - first_query;
    std::fill_n(scores_.at(r * lanes), std::clamp<int64_t>(first_seeing, 0, lanes), -kInfinity);
  }

  void clear_padding(int64_t lanes) {
    const int64_t first = round_up(valid_, kPair<C>);
    std::fill(weights_.at(first * lanes), weights_.at(padded_ * lanes), C(0.0f));
    std::fill(ds_.at(first * lanes), ds_.at(padded_ * lanes), C(0.0f));
    if constexpr (kPair<C> == 2) {
      std::fill(ds_pairs_.at(first * lanes), ds_pairs_.at(padded_ * lanes), C(0.0f));
    }
  }

  void store(int64_t batch, int64_t kv_head, int64_t rows, bool seen) {
    const Vec scale(g_.scale);
    for (int64_t r = 0; r < rows; ++r) {
      T* dk = a_.dk.at<T>(batch, kv_head, first_key_ + r);
      T* dv = a_.dv.at<T>(batch, kv_head, first_key_ + r);
      if (seen && r < valid_) {
        float* row = dk_.at(r * width_);
        at::vec::map([&](Vec x) { return x * scale; }, row, row, g_.head_dim);
        row_from_float(row, dk, g_.head_dim);
        row_from_float(dv_.at(r * value_width_), dv, g_.value_dim);
      } else {
        std::fill_n(dk, g_.head_dim, T(0.0f));
        std::fill_n(dv, g_.value_dim, T(0.0f));
      }
    }
  }

  const BackwardArguments& a_;
  const Geometry& g_;
  const QueryPanels<T, C>& queries_;
  const int64_t width_, value_width_;
  Buffer<C> keys_, keys_transposed_, values_;
  Buffer<float> scores_, score_grads_;  // S^T and dP^T
  Buffer<C> weights_, ds_, ds_pairs_;   // P^T and dS^T as operands A, dS^T as operand B
  Buffer<float> dk_, dv_;
  int64_t valid_ = 0, padded_ = 0, first_key_ = 0;
  ReleaseMatrixUnit<C> release_;
};

template <typename T, typename C>
class Backward {
 public:
  explicit Backward(const BackwardArguments& arguments)
      : a_(arguments), g_(arguments.geometry), queries_(arguments) {}

  void run() {
    const int64_t items = g_.batch * g_.kv_heads;
    for (int64_t first = 0; first < items; first += plan_.items) {
      plan_ = plan_pass(items - first, g_.kv.blocks(), at::get_num_threads());
      first_ = first;
      queries_.pack(first, plan_.items);
      cut_into_chunks();
      over_keys();
      sum_query_grads();
    }
  }

 private:
  // Chunk c of an item is the key blocks [bounds[c], bounds[c + 1]), with about equal work.
  void cut_into_chunks() {
    bounds_.assign(plan_.items * (plan_.chunks + 1), 0);
    std::vector<int64_t> work(g_.kv.blocks());
    for (int64_t item = 0; item < plan_.items; ++item) {
      const int64_t batch = (first_ + item) / g_.kv_heads, kv_head = (first_ + item) % g_.kv_heads;
      int64_t total = 0;
      for (int64_t block = 0; block < g_.kv.blocks(); ++block) {
        int64_t queries = 0;
        for (int64_t n = 0; n < g_.group(); ++n) {
          queries += g_.queries_of(batch, kv_head * g_.group() + n, block).count;
        }
        work[block] = queries * g_.kv.at(batch, block) + 1;
        total += work[block];
      }
      int64_t* bounds = bounds_.data() + item * (plan_.chunks + 1);
      int64_t block = 0, done = 0;
      for (int64_t c = 1; c <= plan_.chunks; ++c) {
        while (block < g_.kv.blocks() && done < total * c / plan_.chunks) done += work[block++];
        bounds[c] = c == plan_.chunks ? g_.kv.blocks() : block;
      }
    }
  }

  void over_keys() {
    grads_.resize(plan_.items * plan_.chunks);
    parallel_tasks(plan_.items * plan_.chunks, [&] {
      return [&, worker = std::make_unique<KeyWorker<T, C>>(a_, queries_)](int64_t task) {
        const int64_t item = task / plan_.chunks, chunk = task % plan_.chunks;
        const int64_t first_slot = queries_.first_slot(item);
        grads_[task] = QueryGradients(first_slot, queries_.first_slot(item + 1) - first_slot,
                                      g_.head_dim * queries_.lanes());
        const int64_t* bounds = bounds_.data() + item * (plan_.chunks + 1) + chunk;
        for (int64_t block = bounds[0]; block < bounds[1]; ++block) {
          worker->run_block(item, (first_ + item) / g_.kv_heads, (first_ + item) % g_.kv_heads,
                            block, grads_[task]);
        }
      };
    });
  }

  void sum_query_grads() {
    const int64_t tasks = plan_.items * g_.group() * g_.q.blocks();
    parallel_tasks(tasks, [&] {
      const int64_t size = kTile * round_up(g_.head_dim, kLaneGrain);
      return [&, sum = Buffer<float>(size), rows = Buffer<float>(size)](int64_t task) {
        const int64_t block = task % g_.q.blocks(), head = task / g_.q.blocks();
        store_query_grads(head / g_.group(), head % g_.group(), block, sum.data(), rows.data());
      };
    });
  }

  void store_query_grads(int64_t item, int64_t group_head, int64_t block, float* sum, float* rows) {
    const int64_t batch = (first_ + item) / g_.kv_heads;
    const int64_t head = (first_ + item) % g_.kv_heads * g_.group() + group_head;
    const int64_t width = round_up(g_.head_dim, kLaneGrain);
    const int64_t start = block * g_.q.block_size, slot = queries_.slot(item, group_head, block);
    const int64_t length = std::min(g_.q.block_size, g_.q.length - start);
    const int64_t valid_length = g_.q.at(batch, block);
    for (int64_t offset = 0; offset < length; offset += kTile) {
      const int64_t valid = std::clamp<int64_t>(valid_length - offset, 0, kTile);
      const int64_t lanes = round_up(valid, kLaneGrain);
      const bool any =
          slot >= 0 && valid > 0 && add_chunks(item, slot + offset / kTile, lanes, sum);
      if (any) transpose_words(sum, lanes, rows, width, width, lanes);
      for (int64_t r = 0; r < std::min(kTile, length - offset); ++r) {
        T* dq = a_.dq.at<T>(batch, head, start + offset + r);
        if (any && r < valid) {
          row_from_float(rows + r * width, dq, g_.head_dim);
        } else {
          std::fill_n(dq, g_.head_dim, T(0.0f));
        }
      }
    }
  }

  // scale * the sum over chunks of one panel's dQ^T; whether there was any.
  bool add_chunks(int64_t item, int64_t slot, int64_t lanes, float* sum) const {
    const int64_t size = g_.head_dim * lanes;
    const Vec scale(g_.scale);
    bool any = false;
    for (int64_t c = 0; c < plan_.chunks; ++c) {
      const QueryGradients& grads = grads_[item * plan_.chunks + c];
      if (!grads.written(slot)) continue;
      const float* part = grads.panel(slot);
      if (any) {
        at::vec::map2([](Vec x, Vec y) { return x + y; }, sum, sum, part, size);
      } else {
        std::copy_n(part, size, sum);
      }
      any = true;
    }
    if (any) at::vec::map([&](Vec x) { return x * scale; }, sum, sum, size);
    return any;
  }

  const BackwardArguments& a_;
  const Geometry& g_;
  QueryPanels<T, C> queries_;
  Plan plan_{0, 0};
  int64_t first_ = 0;
  std::vector<int64_t> bounds_;
  std::vector<QueryGradients> grads_;
};

}  // namespace

void attention_backward(const BackwardArguments& arguments) {
  with_dtypes(arguments.geometry,
              [&]<typename T, typename C>() { Backward<T, C>(arguments).run(); });
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
