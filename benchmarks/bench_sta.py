"""Sliding tile attention against dense attention and FlexAttention, on a GPU or a CPU.

    python benchmarks/bench_sta.py                      # on a GPU: 30x48x80, 24 heads, bf16
    python benchmarks/bench_sta.py --window 3x3x3 5x5x5 --text 256

Without a GPU the default is a small video, 12x24x40 and 2 heads in fp32. The table times the
kernels on tokens in tile order; what else a call costs (mask, tile order) stands below it.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial

import torch
from cases import Case, sta_case
from measure import COLUMNS, rows_of, time_case
from options import Options, run_benchmark
from peers import backend_names, dense_peers, flex_peer, our_providers

from st_attn import sliding_tile_attention
from video_attn import VideoLayout, sliding_tile, sliding_tile_mask
from video_attn.layout import Triple, as_triple
from video_attn.tools.bench import (
    Result,
    Timing,
    print_table,
    say,
    time_interleaved,
)

TILE_ORDER, RASTER = "st_attn.sliding_tile_attention", "video_attn.sliding_tile, raster order"
NEW_MASK, KEPT_MASK = "mask of 24 new windows", "mask of 24 known windows"


def bench_window(options: argparse.Namespace, window: Triple) -> list[Result]:
    """Kernel, calls and mask for one window; prints as it goes."""
    layout = VideoLayout(options.grid, options.tile, options.text)
    grid, tile, wide = ("x".join(map(str, x)) for x in (layout.grid, layout.tile, window))
    say(f"window {wide}")
    case = sta_case(
        layout, window, options.heads, options.head_dim, options.dtype, options.device,
        options.valid_text,
    )  # fmt: skip
    density = case.problem["density"]
    providers = [*our_providers(case), *dense_peers(case.device)]
    if options.flex:
        providers.append(flex_peer(case.device))
    results = time_case(case, providers, options.repeats, options.backward)
    forward, backward = backend_names(case)
    title = (
        f"{grid} tokens, tile {tile}, window {wide} tiles, text {options.valid_text} of "
        f"{options.text}: density {density:.4f}; {options.heads} heads, head_dim "
        f"{options.head_dim}, {options.dtype}; backend forward {forward}, backward {backward}"
    )
    print_table(title, COLUMNS, rows_of(results))
    if options.flex and case.device.type == "cpu":
        print("FlexAttention has no backward pass on a CPU.")
    if layout.is_ragged:
        print("no call times: the tile does not divide the grid, and a call pads it first")
        return results
    say("whole calls")
    calls = time_calls(options, layout, window, case)
    print_table(
        "a whole call, forward", ("what", "median (p20 to p80)"), [(n, t) for n, t in calls.items()]
    )
    problem = {**case.problem, "pass": "forward"}
    return results + [Result(problem, name, timing) for name, timing in calls.items()]


def time_calls(
    options: argparse.Namespace, layout: VideoLayout, window: Triple, case: Case
) -> dict[str, Timing]:
    """The user's functions: with tokens in tile order, and in raster order (four gathers more)."""
    q, k, v = case.quiet
    valid = options.valid_text
    calls = {
        TILE_ORDER: lambda: sliding_tile_attention(
            q, k, v, window, valid, True, layout.grid, tile_size=layout.tile
        ),
        RASTER: lambda: sliding_tile(
            q, k, v, layout.grid, window, tile=layout.tile, text_length=valid
        ),
    }
    return time_interleaved(calls, device=options.device, repeats=options.repeats, seconds=2.0)


def time_masks(options: argparse.Namespace) -> dict[str, Timing]:
    """The mask of 24 different head windows, first time and from the cache, without the kernel."""
    layout = VideoLayout(options.grid, options.tile, options.text)
    rng = random.Random(0)

    def windows() -> list[Triple]:
        return [tuple(rng.randint(1, n) for n in layout.tile_grid) for _ in range(24)]  # type: ignore[misc]

    def seconds(given: list[Triple]) -> float:
        start = time.perf_counter()
        sliding_tile_mask(layout, given, device=options.device)
        if torch.device(options.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(windows())
    fresh = [windows() for _ in range(10)]
    first = [seconds(given) for given in fresh]
    kept = [seconds(fresh[-1]) for _ in range(200)]
    return {NEW_MASK: Timing(tuple(first)), KEPT_MASK: Timing(tuple(kept))}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    triple = partial(as_triple, name="size")
    asked = Options("sta", __doc__)
    asked.sized("--grid", (30, 48, 80), (12, 24, 40), "tokens TxHxW", type=triple)
    asked.add("--tile", type=triple, default=(6, 8, 8), help="tokens per tile (6x8x8)")
    windows = [(3, 3, 3), (5, 5, 5)], [(1, 3, 3)]
    asked.sized("--window", *windows, "tiles", type=triple, nargs="+")
    asked.add("--text", type=int, default=0, help="text tokens after the video (0)")
    asked.add("--valid-text", type=int, help="how many of them are valid (all)")
    asked.count("--heads", 24, 2, "heads")
    asked.add("--head-dim", type=int, default=128, help="head_dim (128)")
    asked.dtype()
    asked.count("--repeats", 10, 3, "timed calls of each provider")
    asked.switch("--backward", "backward too")
    asked.switch("--flex", "FlexAttention too")
    options = asked.parse(arguments)
    if options.valid_text is None:
        options.valid_text = options.text
    return options


def bench(options: argparse.Namespace) -> list[Result]:
    results = [result for window in options.window for result in bench_window(options, window)]
    say("masks")
    masks = time_masks(options)
    rows = [(name, f"{timing.median * 1e6:.0f} us") for name, timing in masks.items()]
    print_table("planning, on the host", ("what", "median"), rows)
    problem = {"grid": "x".join(map(str, options.grid)), "text": options.text, "pass": "planning"}
    return results + [Result(problem, name, timing) for name, timing in masks.items()]


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
