// Forward in a quantized precision: codes of q, k, v as operands. INT8 codes are multiplied as
// INT8 where the CPU has VNNI; FP8 codes, which no common CPU multiplies, as the bf16 or fp32
// numbers that they are. Either way the products and the sums of INT8 codes are exact.

#include "cpu/kernels/forward_loop.h"
#include "cpu/kernels/quantized_panels.h"

namespace video_attn::cpu::CPU_CAPABILITY {
namespace {

// The left and right operand of a product of codes, and its result.
template <typename Key>
struct Operands {
  using Query = Key;
  using Sum = float;
};
template <>
struct Operands<uint8_t> {
  using Query = int8_t;
  using Sum = int32_t;
};

template <typename T, typename Key, typename C, typename WeightRounding>
class QuantizedMath {
 public:
  using Context = QuantizedContext<T>;
  using Packing = QuantizedPacking<T, Key, C>;
  using Weight = C;
  using Rounding = WeightRounding;
  using Query = typename Operands<Key>::Query;
  using Sum = typename Operands<Key>::Sum;
  static constexpr int64_t kStepPanels = 1;  // weights are rounded against the maximum of a tile

  explicit QuantizedMath(const Context& context)
      : context_(context),
        g_(context.geometry()),
        recipe_(context.arguments.recipe),
        width_(row_width<Query>(g_.head_dim)),
        queries_(context.arguments),
        rows_(kTile * width_),
        transposed_(kTile * width_) {}

  void load_queries(int64_t batch, int64_t head, int64_t start, int64_t valid, int64_t lanes) {
    const int64_t item = context_.kv_item(batch, head);
    v_scale_ = context_.statistics.v_scale(item);
    v_mean_ = context_.statistics.v_mean(item);
    queries_.load(batch, head, start, valid);
    for (int64_t r = 0; r < valid; ++r) {
      lse_shift_[r] =
          recipe_.smooth_k
              ? g_.scale * dot(queries_.row(r), context_.statistics.k_mean(item), queries_.width())
              : 0.0f;
    }
    queries_.smooth(valid);
    std::array<Scale, kMaxGroups> scales;
    const auto group = [&](int64_t r) { return query_group(recipe_.granularity, r); };
    if (recipe_.granularity == Granularity::kPerHead) {
      scales[0] = context_.query_scales[batch * g_.q_heads + head];
    } else {
      scales =
          scales_of_groups(queries_.row(0), queries_.width(), valid, context_.score_limit(), group);
    }
    std::memset(static_cast<void*>(rows_.data()), 0, lanes * width_ * sizeof(Query));
    for (int64_t r = 0; r < lanes; ++r) {
      const Scale scale = r < valid ? scales[group(r)] : Scale{0.0f, 0.0f};
      factors_[r] = scale.scale * (g_.scale * kLog2e);
      offsets_[r] = r < valid ? encode_row(r, Vec(scale.inverse)) : 0;
    }
    transpose_to_b(rows_.data(), width_, transposed_.data(), lanes);
  }

  // Base-2 scores of one panel. The sums of codes are made where the scores will be.
  void scores(const typename Packing::Panel& panel, int64_t lanes, float* target) const {
    Sum* sums = reinterpret_cast<Sum*>(target);
    const int64_t inner = round_up(g_.head_dim, kPair<Key>);
    if constexpr (std::is_same_v<Key, uint8_t>) {
      multiply(panel.padded_rows, lanes, inner, panel.keys, width_, transposed_.data(), lanes, sums,
               lanes);
    } else {
      multiply(panel.padded_rows, lanes, inner, panel.keys, width_, transposed_.data(), lanes, sums,
               lanes, false);
    }
    for (int64_t lane = 0; lane < lanes; lane += Vec::size()) {
      const Vec factor = Vec::loadu(factors_ + lane);
      const IntVec offset = IntVec::loadu(offsets_ + lane);
      for (int64_t r = 0; r < panel.rows; ++r) {
        float* row = target + r * lanes + lane;
        (number(row, offset) * (factor * Vec(panel.scales[r]))).store(row);
      }
    }
    if (recipe_.smooth_q) add_query_mean(panel, lanes, target);
  }

  float score_scale() const { return 1.0f; }

  // A row whose keys are all hidden stays 0.
  void finish_row(float* row, float lse) const {
    if (lse == -kInfinity) return;
    for (int64_t i = 0; i < g_.value_dim; i += Vec::size()) {
      (Vec::loadu(row + i) * Vec::loadu(v_scale_ + i) + Vec::loadu(v_mean_ + i)).store(row + i);
    }
  }

  float finish_lse(int64_t r, float lse) const {
    if (lse == -kInfinity) return lse;
    return lse - Rounding::kExponent * kLn2 + lse_shift_[r];
  }

 private:
  // Codes of query r; returns what unsigned keys add to its sums: 128 times the sum of its codes.
  int32_t encode_row(int64_t r, Vec inverse) {
    float* row = queries_.row(r);
    Vec sum(0.0f);
    for (int64_t i = 0; i < queries_.width(); i += Vec::size()) {
      const Vec code = code_of(Vec::loadu(row + i), inverse, context_.score_limit());
      sum = sum + code;
      code.store(row + i);
    }
    store_codes(row, rows_.at(r * width_), queries_.width());
    if constexpr (!std::is_same_v<Key, uint8_t>) return 0;
    return 128 * static_cast<int32_t>(
                     at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum));
  }

  static Vec number(const float* sums, IntVec offset) {
    if constexpr (std::is_same_v<Sum, float>) {
      return Vec::loadu(sums);
    } else {
      return at::vec::convert<float>(IntVec::loadu(sums) - offset);
    }
  }

  // smooth_q: what the mean of the queries adds to the scores of every key.
  void add_query_mean(const typename Packing::Panel& panel, int64_t lanes, float* target) const {
    for (int64_t r = 0; r < panel.rows; ++r) {
      const float* key = panel.float_keys + r * queries_.width();
      const Vec shift(dot(queries_.mean(), key, queries_.width()) * (g_.scale * kLog2e));
      for (int64_t lane = 0; lane < lanes; lane += Vec::size()) {
        float* p = target + r * lanes + lane;
        (Vec::loadu(p) + shift).store(p);
      }
    }
  }

  const Context& context_;
  const Geometry& g_;
  const Recipe& recipe_;
  const int64_t width_;
  QueryRows<T> queries_;
  Buffer<Query> rows_, transposed_;
  alignas(64) float factors_[kTile];    // of each query: its scale, that of the scores, log2(e)
  alignas(64) int32_t offsets_[kTile];  // and what its sums hold too much
  alignas(64) float lse_shift_[kTile];
  const float *v_scale_ = nullptr, *v_mean_ = nullptr;
  ReleaseMatrixUnit<Key> release_;
};

template <typename T, typename Key, typename C, typename Rounding>
void run(const QuantizedArguments& arguments) {
  const QuantizedContext<T> context(arguments);
  run_forward<T, QuantizedMath<T, Key, C, Rounding>>(arguments.forward, context);
}

template <typename T>
void choose_operands(const QuantizedArguments& arguments) {
  const Recipe& recipe = arguments.recipe;
#if defined(CPU_CAPABILITY_AVX512)
  const Geometry& g = arguments.forward.geometry;
  if (!recipe.fp8_values) {
    if (g.int8_products) return run<T, uint8_t, float, HalfRounding>(arguments);
  } else if (g.bf16_products) {
    if (recipe.fp8_scores) return run<T, at::BFloat16, at::BFloat16, E4m3Rounding>(arguments);
    if (g.int8_products) return run<T, uint8_t, at::BFloat16, E4m3Rounding>(arguments);
  } else if (!recipe.fp8_scores && g.int8_products) {
    return run<T, uint8_t, float, E4m3Rounding>(arguments);
  }
#endif
  if (!recipe.fp8_values) return run<T, float, float, HalfRounding>(arguments);
  return run<T, float, float, E4m3Rounding>(arguments);
}

}  // namespace

void quantized_forward(const QuantizedArguments& arguments) {
  switch (arguments.forward.geometry.dtype) {
    case at::kFloat:
      return choose_operands<float>(arguments);
    case at::kHalf:
      return choose_operands<at::Half>(arguments);
    case at::kBFloat16:
      return choose_operands<at::BFloat16>(arguments);
    default:
      TORCH_CHECK_TYPE(false, "q must be float32, bfloat16 or float16, got ",
                       arguments.forward.geometry.dtype);
  }
}

}  // namespace video_attn::cpu::CPU_CAPABILITY
