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
from pathlib import Path

import torch
from cases import DTYPES, Case, sta_case
from measure import COLUMNS, rows_of, time_case
from peers import backend_names, dense_peers, flex_peer, our_providers

from st_attn import sliding_tile_attention
from video_attn import VideoLayout, sliding_tile, sliding_tile_mask
from video_attn.layout import Triple, as_triple
from video_attn.tools.bench import (
    Record,
    Result,
    Timing,
    WrongResultError,
    print_table,
    record_path,
    say,
    time_interleaved,
    write_record,
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    triple = partial(as_triple, name="size")
    add("--device", default="cuda" if gpu else "cpu", help="default: cuda if there, else cpu")
    add("--grid", type=triple, help="tokens TxHxW (30x48x80; on a CPU 12x24x40)")
    add("--tile", type=triple, default=(6, 8, 8), help="tokens per tile (6x8x8)")
    add("--window", type=triple, nargs="+", help="tiles (3x3x3 and 5x5x5; on a CPU 1x3x3)")
    add("--text", type=int, default=0, help="text tokens after the video (0)")
    add("--valid-text", type=int, help="how many of them are valid (all)")
    add("--heads", type=int, help="heads (24; on a CPU 2)")
    add("--head-dim", type=int, default=128, help="head_dim (128)")
    add("--dtype", choices=list(DTYPES), help="bfloat16; on a CPU float32")
    add("--repeats", type=int, help="timed calls of each provider (10; on a CPU 3)")
    add("--backward", action=argparse.BooleanOptionalAction, default=True, help="backward too")
    add("--flex", action=argparse.BooleanOptionalAction, default=True, help="FlexAttention too")
    add("--output", type=Path, help="JSON record (benchmarks/results/sta_MODEL.json)")
    options = parser.parse_args(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    for name, on_gpu, small in (
        ("grid", (30, 48, 80), (12, 24, 40)),
        ("window", [(3, 3, 3), (5, 5, 5)], [(1, 3, 3)]),
        ("heads", 24, 2),
        ("repeats", 10, 3),
        ("dtype", "bfloat16", "float32"),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if on_cpu else on_gpu)
    if options.valid_text is None:
        options.valid_text = options.text
    if options.output is None:
        options.output = record_path("sta", options.device)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    results: list[Result] = []
    try:
        for window in options.window:
            results += bench_window(options, window)
    except WrongResultError as error:
        print(f"error: {error}")
        return 1
    say("masks")
    masks = time_masks(options)
    rows = [(name, f"{timing.median * 1e6:.0f} us") for name, timing in masks.items()]
    print_table("planning, on the host", ("what", "median"), rows)
    problem = {"grid": "x".join(map(str, options.grid)), "text": options.text, "pass": "planning"}
    results += [Result(problem, name, timing) for name, timing in masks.items()]
    write_record(Record.of("bench_sta", results, options.device), options.output)
    print(f"record: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
