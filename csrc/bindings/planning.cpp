// Python module video_attn._planning, for tests and curiosity: what the launchers plan (config.h),
// and what the kernels make of lists (plan.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "hopper/plan.h"

namespace py = pybind11;

namespace video_attn::hopper {
namespace {

void check_positive(const char* name, int64_t value) {
  if (value < 1) {
    throw std::invalid_argument(std::string(name) + " must be at least 1, got " +
                                std::to_string(value));
  }
}

Grain grain_of(const std::string& name) {
  if (name == "coarse") return Grain::kCoarse;
  if (name == "fine") return Grain::kFine;
  throw std::invalid_argument("grain must be 'coarse' or 'fine', got '" + name + "'");
}

py::dict forward_plan(const std::string& grain, int32_t batch, int32_t heads, int32_t length,
                      int32_t block_size, int32_t head_dim, int32_t multiprocessors) {
  for (const auto& [name, value] :
       {std::pair{"batch", batch}, std::pair{"heads", heads}, std::pair{"length", length},
        std::pair{"block_size", block_size}, std::pair{"head_dim", head_dim},
        std::pair{"multiprocessors", multiprocessors}}) {
    check_positive(name, value);
  }
  if (head_dim > 128) throw std::invalid_argument("head_dim must be at most 128");
  Problem problem{};
  problem.batch = batch;
  problem.heads = heads;
  problem.head_dim = head_dim;
  problem.q_side = problem.kv_side = {length, block_size, {nullptr, 0}};
  const ForwardPlan plan = plan_forward(grain_of(grain), problem, multiprocessors);
  py::dict result;
  result["channels"] = plan.config.head_dim;
  result["tile_tokens"] = kTileTokens;
  result["step_tokens"] = kStepTokens;
  result["threads"] = kForwardThreads;
  result["stages"] = plan.config.stages;
  result["shared_bytes"] = plan.config.shared_bytes();
  result["tiles"] = plan.tiles;
  result["blocks"] = plan.blocks;
  result["draws_dense_tiles"] = plan.draws_dense_tiles;
  return result;
}

using Blocks = std::vector<int32_t>;
using OptionalLens = std::optional<std::vector<int32_t>>;

// The side of the keys; `lens` must outlive it.
Side key_side(const std::vector<const Blocks*>& lists, int32_t block_size, int32_t length,
              const OptionalLens& lens) {
  check_positive("block_size", block_size);
  check_positive("length", length);
  const int32_t blocks = divide_up(length, block_size);
  if (lens && static_cast<int32_t>(lens->size()) != blocks) {
    throw std::invalid_argument("lens must have " + std::to_string(blocks) + " entries, has " +
                                std::to_string(lens->size()));
  }
  for (const Blocks* list : lists) {
    for (const int32_t block : *list) {
      if (block < 0 || block >= blocks) {
        throw std::invalid_argument("blocks must lie in 0 to " + std::to_string(blocks - 1) +
                                    ", got " + std::to_string(block));
      }
    }
  }
  return {length, block_size, {lens ? lens->data() : nullptr, 0}};
}

py::dict row_plan(const Blocks& blocks, int32_t block_size, int32_t length,
                  const OptionalLens& lens) {
  const RowPlan row = plan_row(blocks, key_side({&blocks}, block_size, length, lens));
  py::list halves;
  for (const KeyHalf& half : row.halves) halves.append(py::make_tuple(half.token, half.valid));
  py::dict result;
  result["halves"] = halves;
  result["full_steps"] = row.counts.full_steps();
  result["steps"] = row.counts.steps();
  return result;
}

py::dict pair_plan(const Blocks& first, const Blocks& second, int32_t length,
                   const OptionalLens& lens) {
  const Side side = key_side({&first, &second}, kUnit, length, lens);
  const PairPlan pair = plan_pair(first, second, side);
  py::dict result;
  result["rows"] = py::make_tuple(pair.rows[0], pair.rows[1]);
  result["shared_steps"] = pair.shared_steps;
  return result;
}

}  // namespace
}  // namespace video_attn::hopper

PYBIND11_MODULE(_planning, m) {
  using namespace video_attn::hopper;
  m.doc() = "Host-side planning of the Hopper kernels: see csrc/hopper/plan.h.";
  m.def("forward_plan", &forward_plan, py::arg("grain"), py::kw_only(), py::arg("batch"),
        py::arg("heads"), py::arg("length"), py::arg("block_size"), py::arg("head_dim"),
        py::arg("multiprocessors"),
        "Tile shape, shared memory, stages and grid of a forward launch.");
  m.def("row_plan", &row_plan, py::arg("blocks"), py::kw_only(), py::arg("block_size"),
        py::arg("length"), py::arg("lens") = py::none(),
        "The halves (first key, valid keys) of a query row that sees the key blocks `blocks`, and "
        "how many steps of two halves they make, of which the first ones need no mask.");
  m.def("pair_plan", &pair_plan, py::arg("first"), py::arg("second"), py::kw_only(),
        py::arg("length"), py::arg("lens") = py::none(),
        "The lists of two rows of blocks of 64 in the order in which they share their loads, and "
        "how many of their first steps are the same.");
}
