// Forward in the dtype of q, k and v: fp32 or bf16 operands, fp32 sums.

#include "cpu/kernels/forward_loop.h"

namespace video_attn::cpu::CPU_CAPABILITY {
namespace {

// Panels of keys as they are, and values transposed; padding is 0.
template <typename T, typename C>
class NativePacking {
 public:
  struct Panel {
    const C* keys;    // [padded_rows, row_width(D)]
    const C* values;  // transposed: [Dv, values_ld]
    int64_t values_ld;
    int64_t rows, padded_rows;
  };
  using Scratch = Buffer<C>;

  explicit NativePacking(const ForwardArguments& arguments)
      : a_(arguments),
        g_(arguments.geometry),
        width_(row_width<C>(g_.head_dim)),
        value_width_(row_width<C>(g_.value_dim)),
        panel_rows_(round_up(std::min({g_.kv.block_size, g_.kv.length, kTile}), kLaneGrain)) {}

  int64_t panel_bytes() const { return panel_rows_ * (width_ + value_width_) * sizeof(C); }

  Panel view(char* data, int64_t rows) const {
    const C* keys = reinterpret_cast<const C*>(data);
    return {keys, keys + panel_rows_ * width_, round_up(rows, kLaneGrain), rows,
            round_up(rows, kRowGrain)};
  }

  Scratch scratch() const { return Scratch(kTile * value_width_); }

  void pack(int64_t batch, int64_t head, int64_t first_key, int64_t rows, char* data,
            const Scratch& value_rows) const {
    const int64_t padded = round_up(rows, kLaneGrain);
    C* keys = reinterpret_cast<C*>(data);
    copy_rows(a_.k.at<const T>(batch, head, first_key), a_.k.row_stride, rows, g_.head_dim, keys,
              width_, padded);
    copy_rows(a_.v.at<const T>(batch, head, first_key), a_.v.row_stride, rows, g_.value_dim,
              value_rows.data(), value_width_, padded);
    transpose_to_a(value_rows.data(), value_width_, keys + panel_rows_ * width_, padded);
  }

 private:
  const ForwardArguments& a_;
  const Geometry& g_;
  const int64_t width_, value_width_, panel_rows_;
};

template <typename T, typename C>
class NativeMath {
 public:
  using Context = ForwardArguments;
  using Packing = NativePacking<T, C>;
  using Weight = C;
  using Rounding = OperandRounding;
  static constexpr int64_t kStepPanels = kStepKeys;

  explicit NativeMath(const ForwardArguments& arguments)
      : a_(arguments),
        g_(arguments.geometry),
        width_(row_width<C>(g_.head_dim)),
        rows_(kTile * width_),
        transposed_(kTile * width_) {}

  void load_queries(int64_t batch, int64_t head, int64_t start, int64_t valid, int64_t lanes) {
    copy_rows(a_.q.at<const T>(batch, head, start), a_.q.row_stride, valid, g_.head_dim,
              rows_.data(), width_, lanes);
    transpose_to_b(rows_.data(), width_, transposed_.data(), lanes);
  }

  void scores(const typename Packing::Panel& panel, int64_t lanes, float* target) const {
    multiply(panel.padded_rows, lanes, round_up(g_.head_dim, kPair<C>), panel.keys, width_,
             transposed_.data(), lanes, target, lanes, false);
  }

  float score_scale() const { return g_.scale * kLog2e; }
  void finish_row(float*, float) const {}
  float finish_lse(int64_t, float lse) const { return lse; }

 private:
  const ForwardArguments& a_;
  const Geometry& g_;
  const int64_t width_;
  Buffer<C> rows_, transposed_;
};

}  // namespace

void attention_forward(const ForwardArguments& arguments) {
  with_dtypes(arguments.geometry, [&]<typename T, typename C>() {
    run_forward<T, NativeMath<T, C>>(arguments, arguments);
  });
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
