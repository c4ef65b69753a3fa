// The operators of the Hopper kernels on CPU tensors, by definition: what a launcher must make of
// its parameters, pair by pair in double precision. For tests of everything above the kernels; not
// shipped. dq follows the lists, dk and dv follow their transpose.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bindings/hopper_operators.h"

namespace video_attn::hopper {
namespace {

constexpr size_t kWorkspace = 512;

// Values of one 16-bit tensor.
struct View {
  Tensor4 tensor;
  Element element;

  int64_t at(int64_t batch, int64_t head, int64_t token, int64_t channel) const {
    return batch * tensor.batch_stride + head * tensor.head_stride + token * tensor.token_stride +
           channel;
  }
  double get(int64_t batch, int64_t head, int64_t token, int64_t channel) const {
    const int64_t i = at(batch, head, token, channel);
    if (element == Element::kFloat16) return static_cast<const c10::Half*>(tensor.data)[i];
    return static_cast<const c10::BFloat16*>(tensor.data)[i];
  }
  void set(int64_t batch, int64_t head, int64_t token, int64_t channel, double value) const {
    const int64_t i = at(batch, head, token, channel);
    const auto narrow = static_cast<float>(value);
    if (element == Element::kFloat16) {
      static_cast<c10::Half*>(tensor.data)[i] = narrow;
    } else {
      static_cast<c10::BFloat16*>(tensor.data)[i] = narrow;
    }
  }
};

// The valid tokens of a block.
struct Range {
  int64_t begin, end;
};

Range valid_range(const Side& side, int64_t batch, int64_t slot) {
  const int64_t begin = slot * side.block_size;
  int64_t valid = std::min<int64_t>(side.block_size, side.length - begin);
  if (side.lens.data) {
    valid = std::min<int64_t>(valid, side.lens.data[batch * side.lens.batch_stride + slot]);
  }
  return {begin, begin + std::max<int64_t>(valid, 0)};
}

// The tokens of `other` that the block of `token` lists; none past the valid tokens of the block.
std::vector<int64_t> partners(const BlockLists& lists, const Side& own, const Side& other,
                              int64_t batch, int64_t head, int64_t token) {
  std::vector<int64_t> tokens;
  const int64_t row = token / own.block_size;
  if (token >= valid_range(own, batch, row).end) return tokens;
  const auto add = [&](int64_t slot) {
    const Range range = valid_range(other, batch, slot);
    for (int64_t i = range.begin; i < range.end; ++i) tokens.push_back(i);
  };
  if (!lists.counts) {
    for (int64_t slot = 0; slot < block_count(other); ++slot) add(slot);
    return tokens;
  }
  const int32_t count =
      lists.counts[batch * lists.counts_batch_stride + head * lists.counts_head_stride +
                   row * lists.counts_row_stride];
  const int32_t* indices = lists.indices + batch * lists.indices_batch_stride +
                           head * lists.indices_head_stride + row * lists.indices_row_stride;
  for (int32_t i = 0; i < count; ++i) add(indices[i * lists.indices_stride]);
  return tokens;
}

double dot(const View& a, const View& b, int64_t batch, int64_t a_head, int64_t b_head,
           int64_t a_token, int64_t b_token, int64_t channels) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    sum += a.get(batch, a_head, a_token, c) * b.get(batch, b_head, b_token, c);
  }
  return sum;
}

template <class Params>
size_t workspace_bytes(const Params&) {
  return kWorkspace;
}

// Every launcher may use all of its workspace, which comes uninitialised.
void spoil(void* workspace) { std::memset(workspace, 0xA5, kWorkspace); }

cudaError_t define_forward(const ForwardParams& p, void* workspace, cudaStream_t) {
  spoil(workspace);
  const Problem& problem = p.problem;
  const View q{p.q, problem.element}, k{p.k, problem.element}, v{p.v, problem.element};
  const View out{p.out, problem.element};
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t h = 0; h < problem.heads; ++h) {
      const int64_t g = h / (problem.heads / problem.kv_heads);
      for (int64_t i = 0; i < problem.q_side.length; ++i) {
        const auto keys = partners(p.lists, problem.q_side, problem.kv_side, b, h, i);
        std::vector<double> scores;
        for (const int64_t j : keys) {
          scores.push_back(problem.scale * dot(q, k, b, h, g, i, j, problem.head_dim));
        }
        double sum = 0, top = -INFINITY;
        for (const double score : scores) top = std::max(top, score);
        for (const double score : scores) sum += std::exp(score - top);
        const double lse = keys.empty() ? -INFINITY : top + std::log(sum);
        p.lse[(b * problem.heads + h) * problem.q_side.length + i] = static_cast<float>(lse);
        for (int64_t c = 0; c < problem.head_dim; ++c) {
          double value = 0;
          for (size_t n = 0; n < keys.size(); ++n) {
            value += std::exp(scores[n] - lse) * v.get(b, g, keys[n], c);
          }
          out.set(b, h, i, c, value);
        }
      }
    }
  }
  return cudaSuccess;
}

// The gradients of one score and of one value, as far as (batch, head, query, key) decides.
struct Pair {
  double weight, grad_score;
};

struct Backward {
  const BackwardParams& p;
  View q, k, v, out, grad_out, dq, dk, dv;

  explicit Backward(const BackwardParams& p)
      : p(p),
        q{p.q, p.problem.element},
        k{p.k, p.problem.element},
        v{p.v, p.problem.element},
        out{p.out, p.problem.element},
        grad_out{p.grad_out, p.problem.element},
        dq{p.dq, p.problem.element},
        dk{p.dk, p.problem.element},
        dv{p.dv, p.problem.element} {}

  int64_t group() const { return p.problem.heads / p.problem.kv_heads; }

  Pair pair(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t g = h / group(), dim = p.problem.head_dim;
    const int64_t row = (b * p.problem.heads + h) * p.problem.q_side.length + i;
    const double weight =
        std::exp(p.problem.scale * dot(q, k, b, h, g, i, j, dim) - static_cast<double>(p.lse[row]));
    double delta = dot(out, grad_out, b, h, h, i, i, dim);
    if (p.grad_lse) delta -= p.grad_lse[row];
    const double grad_weight = dot(grad_out, v, b, h, g, i, j, dim);
    return {weight, weight * (grad_weight - delta) * p.problem.scale};
  }

  void queries() const {
    for (int64_t b = 0; b < p.problem.batch; ++b) {
      for (int64_t h = 0; h < p.problem.heads; ++h) {
        for (int64_t i = 0; i < p.problem.q_side.length; ++i) {
          std::vector<double> sum(p.problem.head_dim, 0.0);
          for (const int64_t j : partners(p.lists, p.problem.q_side, p.problem.kv_side, b, h, i)) {
            const double grad_score = pair(b, h, i, j).grad_score;
            for (size_t c = 0; c < sum.size(); ++c) {
              sum[c] += grad_score * k.get(b, h / group(), j, c);
            }
          }
          for (size_t c = 0; c < sum.size(); ++c) dq.set(b, h, i, c, sum[c]);
        }
      }
    }
  }

  void keys() const {
    for (int64_t b = 0; b < p.problem.batch; ++b) {
      for (int64_t g = 0; g < p.problem.kv_heads; ++g) {
        for (int64_t j = 0; j < p.problem.kv_side.length; ++j) {
          std::vector<double> dk_sum(p.problem.head_dim, 0.0), dv_sum = dk_sum;
          for (int64_t h = g * group(); h < (g + 1) * group(); ++h) {
            for (const int64_t i :
                 partners(p.transposed, p.problem.kv_side, p.problem.q_side, b, h, j)) {
              const Pair gradients = pair(b, h, i, j);
              for (size_t c = 0; c < dk_sum.size(); ++c) {
                dk_sum[c] += gradients.grad_score * q.get(b, h, i, c);
                dv_sum[c] += gradients.weight * grad_out.get(b, h, i, c);
              }
            }
          }
          for (size_t c = 0; c < dk_sum.size(); ++c) {
            dk.set(b, g, j, c, dk_sum[c]);
            dv.set(b, g, j, c, dv_sum[c]);
          }
        }
      }
    }
  }
};

cudaError_t define_backward(const BackwardParams& p, void* workspace, cudaStream_t) {
  spoil(workspace);
  const Backward backward(p);
  backward.queries();
  backward.keys();
  return cudaSuccess;
}

struct HostContext {
  HostContext(const char*, const Tensor&) {}
  static const char* describe(cudaError_t) { return "on the host"; }

  cudaStream_t stream = nullptr;
};

constexpr Kernel<ForwardParams> kCoarseForward{"hopper_coarse_forward", workspace_bytes,
                                               define_forward, kCoarseBlocks};
constexpr Kernel<BackwardParams> kCoarseBackward{"hopper_coarse_backward", workspace_bytes,
                                                 define_backward, kCoarseBlocks};
constexpr Kernel<ForwardParams> kFineForward{"hopper_fine_forward", workspace_bytes, define_forward,
                                             kFineBlocks};
constexpr Kernel<BackwardParams> kFineBackward{"hopper_fine_backward", workspace_bytes,
                                               define_backward, kFineBlocks};

}  // namespace
}  // namespace video_attn::hopper

STABLE_TORCH_LIBRARY_IMPL(video_attn, CPU, m) {
  using namespace video_attn::hopper;
  m.impl("hopper_coarse_forward", TORCH_BOX((&forward<HostContext, kCoarseForward>)));
  m.impl("hopper_coarse_backward", TORCH_BOX((&backward<HostContext, kCoarseBackward>)));
  m.impl("hopper_fine_forward", TORCH_BOX((&forward<HostContext, kFineForward>)));
  m.impl("hopper_fine_backward", TORCH_BOX((&backward<HostContext, kFineBackward>)));
}
