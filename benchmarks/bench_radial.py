"""Radial attention on 13 x 30 x 45 tokens, as CogVideoX has: error beside STA and VSA, and speed.

The error is that of attention alone, on the tokens of a real clip (patches of pixels with 3-D
rotary positions; no trained weights), against dense attention in fp32. For every radial rule, STA
gets the best of all windows of about the same density, and VSA the number of tiles that comes
closest to it. The speed is of one layer, text first, beside torch's dense SDPA in the same run.

    python benchmarks/bench_radial.py                # all tables; --only error, speed or masks
    python benchmarks/bench_radial.py --heads 30     # the layer of CogVideoX-2b
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cases import DTYPES
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from video_attn import BlockMask, VideoLayout, attention, sliding_tile_mask, video_sparse
from video_attn.calls import problem_of
from video_attn.patterns.radial import RadialRule, radial_mask
from video_attn.registry import select
from video_attn.tools.bench import (
    Record,
    Result,
    Timing,
    WrongResultError,
    print_table,
    relative_error,
    require_correct,
    time_interleaved,
    write_record,
)
from video_attn.tools.demo.tokens import HEADS, PATCH, Tokens, tokens_of
from video_attn.tools.video import pan_and_zoom, photograph

GRID, TEXT, HEAD_DIM = (13, 30, 45), 226, 64
TILE = (4, 4, 4)  # of STA and VSA
SAME_DENSITY = 0.03  # relative: STA windows this close to a density count as having it
RULES = {
    "radial, decay 1": RadialRule.for_model("cogvideox", 1.0),
    "radial, decay 0.5": RadialRule.for_model("cogvideox", 0.5),
    "radial, decay 0.2": RadialRule.for_model("cogvideox", 0.2),
    "radial, one diagonal": RadialRule(0.2, neighbor_fraction=0.125, min_window=32),
}
DENSE = "torch SDPA, dense"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Error = Callable[[Tensor], float]


# -- error -----------------------------------------------------------------------------------------


@torch.no_grad()
def error_results() -> Iterator[Result]:
    """Radial attention, and STA and VSA at its density."""
    clip = pan_and_zoom(photograph(), GRID[0], (GRID[1] * PATCH, GRID[2] * PATCH))
    tokens = tokens_of(clip, torch.device("cpu"), torch.float32)
    exact = scaled_dot_product_attention(tokens.q, tokens.k, tokens.v)

    def error(out: Tensor) -> float:
        return relative_error(out, exact)

    layout = VideoLayout(GRID, (1, *GRID[1:]))
    for name, rule in RULES.items():
        mask = radial_mask(layout, rule)
        run = lambda mask=mask: attention(tokens.q, tokens.k, tokens.v, mask)  # noqa: E731
        yield _error_result(name, mask, run, error)
        yield _best_sliding_tile(tokens, mask.density(), error)
        yield _video_sparse(tokens, mask.density(), error)


def _error_result(name: str, mask: BlockMask, run: Callable[[], Tensor], error: Error) -> Result:
    start = time.perf_counter()
    out = run()
    timing = Timing((time.perf_counter() - start,))
    problem = {"tokens": GRID, "of": "a clip", "heads": HEADS, "head_dim": HEAD_DIM, "tile": TILE}
    return Result(problem, name, timing, {"density": mask.density(), "relative_error": error(out)})


def _best_sliding_tile(tokens: Tokens, density: float, error: Error) -> Result:
    """The window with the smallest error of all that have the density."""
    layout = VideoLayout(GRID, TILE)
    q, k, v = map(layout.to_tiles, (tokens.q, tokens.k, tokens.v))
    results = []
    for window in itertools.product(*(range(1, n + 1) for n in layout.tile_grid)):
        shares = map(_axis_density, layout.grid, layout.tile, window)
        if abs(math.prod(shares) / density - 1) > SAME_DENSITY:
            continue
        mask = sliding_tile_mask(layout, window)
        run = lambda mask=mask: layout.from_tiles(attention(q, k, v, mask))  # noqa: E731
        name = f"STA, window {'x'.join(map(str, window))} tiles"
        results.append(_error_result(name, mask, run, error))
    return min(results, key=lambda result: result.metrics["relative_error"])


def _axis_density(length: int, tile: int, window: int) -> float:
    """The share of its axis that a token sees on average, border tiles being smaller."""
    sizes = [min(tile, length - start) for start in range(0, length, tile)]
    pairs = 0
    for at, size in enumerate(sizes):
        low = min(max(at - window // 2, 0), len(sizes) - window)
        pairs += size * sum(sizes[low : low + window])
    return pairs / length**2


def _video_sparse(tokens: Tokens, density: float, error: Error) -> Result:
    tiles = VideoLayout(GRID, TILE).num_tiles
    top_k = round(density * tiles)
    options = {"tile": TILE, "top_k": top_k, "gate": 0}
    _, mask = video_sparse(tokens.q, tokens.k, tokens.v, GRID, **options, return_mask=True)
    run = lambda: video_sparse(tokens.q, tokens.k, tokens.v, GRID, **options)  # noqa: E731
    return _error_result(f"VSA, {top_k} of {tiles} tiles", mask, run, error)


# -- speed -----------------------------------------------------------------------------------------


@torch.no_grad()
def speed_results(options: argparse.Namespace, device: torch.device) -> Iterator[Result]:
    """Dense SDPA and radial attention in turn; results that are wrong stop the run."""
    layout = VideoLayout(GRID, (1, *GRID[1:]), TEXT, text_first=True)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, options.heads, layout.sequence_length, HEAD_DIM)
    values = torch.randn(shape, generator=generator)
    masks = {name: radial_mask(layout, RULES[name], device=device) for name in list(RULES)[:3]}
    for dtype_name in options.dtype:
        dtype = DTYPES[dtype_name]
        q, k, v = values.to(device, dtype)
        providers: dict[str, Callable[[], Tensor]] = {
            DENSE: lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v)
        }
        for name, mask in masks.items():
            _check(q, k, v, mask, name)
            providers[name] = lambda q=q, k=k, v=v, mask=mask: attention(q, k, v, mask)
        timings = time_interleaved(providers, device=device, repeats=options.repeats)
        for name, timing in timings.items():
            density = masks[name].density() if name in masks else 1.0
            dense = timings[DENSE].median
            backend = "torch"
            if name in masks:
                backend = select(problem_of("forward", q, k, v, masks[name])).name
            problem = {
                "tokens": GRID, "text": TEXT, "heads": options.heads, "head_dim": HEAD_DIM,
                "block_size": 128, "dtype": dtype_name, "backend": backend,
            }  # fmt: skip
            metrics = {
                "density": density,
                "speed_up_over_dense": dense / timing.median,
                "dense_share": dense * density / timing.median,
            }
            yield Result(problem, name, timing, metrics)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, name: str) -> None:
    """The last head, some blocks of queries, against SDPA in fp32 with a token mask."""
    q, k, v = (x[:, -1:] for x in (q, k, v))
    out = attention(q, k, v, mask)
    size = mask.q_block_size
    keys = torch.arange(mask.kv_len, device=mask.device) // mask.kv_block_size
    for block in (0, 2, mask.num_q_blocks // 2, mask.num_q_blocks - 1):
        rows = slice(block * size, min((block + 1) * size, mask.q_len))
        seen = mask.to_dense()[0, 0, block][keys]
        exact = scaled_dot_product_attention(
            q[:, :, rows].float(), k.float(), v.float(), attn_mask=seen[None, :]
        )
        require_correct(f"{name}, block {block}", out[:, :, rows], exact, LIMITS[q.dtype])


def mask_results() -> Iterator[Result]:
    """Building a mask on the CPU, and finding it again."""
    sizes = {"CogVideoX, 17,776 tokens": (GRID, TEXT), "720p, 75,600 tokens": ((21, 45, 80), 0)}
    for name, (grid, text) in sizes.items():
        layout = VideoLayout(grid, (1, *grid[1:]), text)
        fresh, again = [], []
        for turn in range(9):
            rule = RadialRule.for_model("wan", 0.2 + turn * 1e-6)  # a new key, the same work
            for samples in (fresh, again):
                start = time.perf_counter()
                radial_mask(layout, rule)
                samples.append(time.perf_counter() - start)
        for provider, samples in (("built", fresh), ("kept", again)):
            problem = {"mask": name, "block_size": 128}
            yield Result(problem, provider, Timing(tuple(samples)))


# -- report ----------------------------------------------------------------------------------------


def print_errors(results: list[Result]) -> None:
    rows = [
        (r.provider, f"{r.metrics['density']:.3f}", f"{r.metrics['relative_error']:.4f}")
        for r in results
    ]
    title = f"Error of attention against dense, {'x'.join(map(str, GRID))} tokens of a clip"
    print_table(title, ("pattern", "density", "relative error"), rows)


def print_speeds(results: list[Result]) -> None:
    rows = [
        (
            r.problem["dtype"], r.provider, r.problem["backend"], r.timing,
            f"{r.metrics['density']:.3f}", f"{r.metrics['dense_share']:.2f}",
            f"{r.metrics['speed_up_over_dense']:.2f}x",
        )
        for r in results
    ]  # fmt: skip
    columns = (
        "dtype", "provider", "backend", "median (p20 to p80)", "density", "share", "speed-up"
    )  # fmt: skip
    heads = results[0].problem["heads"]
    print_table(f"{heads} heads, 226 + 17,550 tokens, head_dim 64, blocks of 128", columns, rows)
    print("share: (time of dense SDPA x density) / time.")


def print_masks(results: list[Result]) -> None:
    rows = [(r.problem["mask"], r.provider, r.timing) for r in results]
    print_table("Masks, on the CPU", ("mask", "", "median (p20 to p80)"), rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--only", choices=("error", "speed", "masks"), help="one of the three tables")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    add("--heads", type=int, default=4, help="heads of the timed layer (default 4)")
    add("--repeats", type=int, default=3, help="timed calls of each provider (default 3)")
    add("--output", type=Path, default=Path(__file__).parent / "results",
        help="folder of the records (default results, beside this script)")  # fmt: skip
    options = parser.parse_args(arguments)
    for name in ("heads", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables = {
        "error": (error_results, print_errors),
        "speed": (lambda: speed_results(options, device), print_speeds),
        "masks": (mask_results, print_masks),
    }
    for name, (measure, show) in tables.items():
        if options.only not in (None, name):
            continue
        try:
            results = list(measure())
        except WrongResultError as error:
            print(f"error: {error}")
            return 1
        show(results)
        path = options.output / f"radial_{name}.json"
        write_record(Record.of(f"radial_{name}", results, device), path)
        print(f"record: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
