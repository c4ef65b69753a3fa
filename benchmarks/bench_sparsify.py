"""One attention layer of LTX-2 and of Wan, dense and sparsified: what a layer gains at each ratio.

    python benchmarks/bench_sparsify.py                 # on a GPU: LTX-2 at 6144 .. 32640 tokens,
                                                        # Wan 14B at 75600, bfloat16
    python benchmarks/bench_sparsify.py --small         # a CPU: is everything there?

"layer" is the module with its projections, norms and output, as a model calls it; "attention" is
scaled_dot_product_attention alone against the method alone. Weights and inputs are random: the time
does not depend on them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from options import Options, run_benchmark
from torch import Tensor, nn
from torch.nn import functional as F

import video_attn.sparsity as mtsa
from video_attn.layout import Triple
from video_attn.tools.bench import (
    Result,
    Timing,
    print_table,
    say,
    time_interleaved,
)

RATIOS = (0.5, 0.3, 0.2)
# The original document's table of expected speed-ups.
EXPECTED = {0.5: "1.5-2x", 0.3: "2-3x", 0.2: "3-4x"}
COLUMNS = ("what", "kept", "median (p20 to p80)", "speed-up", "document", "at most")


class Layer(NamedTuple):
    """A layer of a model and the video it attends over."""

    model: str
    grid: Triple
    heads: int
    head_dim: int


LAYERS = (
    Layer("ltx2", (16, 16, 24), 32, 128),  # 512x768x121
    Layer("ltx2", (16, 24, 40), 32, 128),  # 768x1280x121
    Layer("ltx2", (16, 28, 48), 32, 128),  # 896x1536x121
    Layer("ltx2", (16, 34, 60), 32, 128),  # 1088x1920x121
    Layer("wan", (21, 45, 80), 40, 128),  # 720x1280x81
)
SMALL = (Layer("ltx2", (4, 8, 8), 2, 32), Layer("wan", (5, 6, 7), 2, 32))


def module_of(layer: Layer, dtype: torch.dtype, device: str) -> nn.Module:
    """The self-attention of a block, with random weights."""
    width = layer.heads * layer.head_dim
    if layer.model == "ltx2":
        from diffusers.models.transformers.transformer_ltx2 import LTX2Attention

        module: nn.Module = LTX2Attention(
            width, heads=layer.heads, kv_heads=layer.heads, dim_head=layer.head_dim
        )
    else:
        from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

        module = WanAttention(
            width, heads=layer.heads, dim_head=layer.head_dim, processor=WanAttnProcessor()
        )
    return module.to(device, dtype).eval()


def bench_layer(layer: Layer, options: argparse.Namespace) -> list[Result]:
    """Dense, then every ratio; prints a table."""
    tokens = math.prod(layer.grid)
    name = f"{layer.model}, {'x'.join(map(str, layer.grid))} = {tokens} tokens"
    say(name)
    module = module_of(layer, options.dtype, options.device)
    x = torch.randn(
        1, tokens, layer.heads * layer.head_dim, dtype=options.dtype, device=options.device
    )
    heads = [
        torch.randn(
            1, tokens, layer.heads, layer.head_dim, dtype=options.dtype, device=options.device
        ).transpose(1, 2)
        for _ in range(3)
    ]
    runs = {"layer, dense": lambda: module(hidden_states=x)}
    runs["attention, dense"] = lambda: F.scaled_dot_product_attention(*heads)
    dense_output = runs["layer, dense"]()
    timings = _timed(runs, options)
    shape = {"video_shape": layer.grid, "top_k_ratio": 1.0, "method": "vsa"}
    mtsa.sparsify(module, {"sparse_cfg": {"*": shape}})
    _check(module(hidden_states=x), dense_output)
    del dense_output
    sparse: Any = module
    for ratio in RATIOS:
        mtsa.set_sparse_attention_attribute(module, "*", {"top_k_ratio": ratio})
        timings |= _timed(
            {
                f"layer, {ratio}": lambda: module(hidden_states=x),
                f"attention, {ratio}": lambda: sparse.forward_attention(*heads),
            },
            options,
        )
    return _results(layer, name, timings, options)


def _timed(runs: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, Timing]:
    return time_interleaved(runs, device=options.device, repeats=options.repeats, warmup=2)


def _check(sparse: Tensor, dense: Tensor) -> None:
    """At ratio 1 the layer is itself."""
    error = float((sparse - dense).float().norm() / dense.float().norm())
    if error > 2e-2:
        raise RuntimeError(f"at ratio 1 the layer differs from its dense form by {error:.3g}")


def _results(
    layer: Layer, name: str, timings: dict[str, Timing], options: argparse.Namespace
) -> list[Result]:
    results, rows = [], []
    for label, timing in timings.items():
        what, _, kept = label.partition(", ")
        speed_up = timings[f"{what}, dense"].median / timing.median
        ratio = None if kept == "dense" else float(kept)
        problem = {
            "model": layer.model, "grid": list(layer.grid), "heads": layer.heads,
            "head_dim": layer.head_dim, "dtype": str(options.dtype).removeprefix("torch."),
            "what": what,
        }  # fmt: skip
        results.append(Result(problem, kept, timing, {"speed_up": speed_up}))
        document = "" if ratio is None else EXPECTED[ratio]
        bound = "" if ratio is None else f"{1 / ratio:.1f}x"
        rows.append((what, kept, timing, f"{speed_up:.2f}x", document, bound))
    print_table(name, COLUMNS, sorted(rows, key=lambda row: row[0]))
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = Options("sparsify", __doc__)
    asked.add("--small", action="store_true", help="small layers, for a machine without a GPU")
    asked.add("--models", nargs="+", choices=("ltx2", "wan"), default=["ltx2", "wan"])
    asked.add("--repeats", type=int, default=10, help="timed calls of each (10)")
    options = asked.parse(arguments)
    options.dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    return options


@torch.inference_mode()
def bench(options: argparse.Namespace) -> list[Result]:
    layers = [x for x in (SMALL if options.small else LAYERS) if x.model in options.models]
    return [result for layer in layers for result in bench_layer(layer, options)]


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
