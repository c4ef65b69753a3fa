"""INT8 and FP8 attention by the Triton kernels: quantizing, attention over codes, and both.

    python benchmarks/bench_triton_codes.py             # on a GPU: dense, STA and VSA, head_dim 128

A result that is not near that of the bf16 kernel is not timed. TFLOPS count attended pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from options import Options, run_benchmark
from torch import Tensor

from video_attn import BlockMask, VideoLayout
from video_attn.backends.triton import forward_launches, quantize_launches, quantized_launches
from video_attn.device import device_info
from video_attn.kernels.launch import run_launches
from video_attn.kernels.launch_tables import CODE_KERNELS, launch_row, unsupported_precision
from video_attn.patterns.sliding_tile import sliding_tile_mask
from video_attn.quantize import GRANULARITIES, QuantizationOptions
from video_attn.tools.bench import (
    Result,
    print_table,
    require_correct,
    say,
    time_interleaved,
)

# Relative L2 error against the bf16 kernel, which itself is off by 0.003.
ERROR_BOUND = {"sage_fp16": 0.023, "sage_fp8": 0.053, "fp8": 0.061}


def masks(options: argparse.Namespace) -> dict[str, tuple[int, BlockMask | None]]:
    """The cases: name -> (tokens, mask)."""
    cases: dict[str, tuple[int, BlockMask | None]] = {
        f"dense, {n} tokens": (n, None) for n in options.tokens
    }
    tile, window = (6, 8, 8), (3, 3, 3)
    layout = VideoLayout(options.grid, tile)
    sta = sliding_tile_mask(layout, window, device=options.device)
    cases[f"STA, grid {options.grid}, window {window}"] = (sta.q_len, sta)
    blocks = options.vsa_tokens // 64
    kept = max(1, blocks // 10)
    chance = torch.rand(1, options.heads, blocks, blocks, device=options.device)
    lists = chance.topk(kept, -1).indices.sort(-1).values.int()
    vsa = BlockMask.from_indices(lists, 64, 64, q_len=options.vsa_tokens, kv_len=options.vsa_tokens)
    cases[f"VSA, {kept} of {blocks} blocks"] = (options.vsa_tokens, vsa)
    return cases


def runs_of(
    qkv: tuple[Tensor, Tensor, Tensor], mask: BlockMask | None, granularity: str
) -> dict[str, Callable[[], object]]:
    """What is timed, by name; every result has been checked."""
    q, k, v = qkv
    arch, dim = device_info(q.device).arch, q.shape[3]
    grain = None if mask is None else mask.q_block_size
    scale = dim**-0.5
    expected, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)

    def call(launches: list) -> Callable[[], object]:
        return lambda: run_launches(launches, q.device)

    itemsize = q.element_size()
    row = launch_row(arch, "forward", dim, itemsize, grain)
    runs = {
        "native": call(
            forward_launches(q, k, v, expected, lse, mask, scale=scale, is_causal=False, row=row)
        )
    }
    runs["native"]()
    for precision in CODE_KERNELS:
        if arch != "cpu" and unsupported_precision(arch, precision) is not None:
            continue
        options = QuantizationOptions(granularity=granularity)
        codes, before = quantize_launches(
            q, k, v, mask, scale=scale, precision=precision, options=options
        )
        out = torch.empty_like(q)
        row = launch_row(arch, precision, dim, 1, grain)
        attend = quantized_launches(
            codes, out, torch.empty_like(lse), mask,
            kv_len=k.shape[2], scale=scale, is_causal=False, row=row,
        )  # fmt: skip
        run_launches([*before, *attend], q.device)
        require_correct(precision, out, expected, ERROR_BOUND[precision])
        runs[f"{precision}: quantize"] = call(before)
        runs[f"{precision}: attention"] = call(attend)
        runs[precision] = call([*before, *attend])
    return runs


def bench_case(
    name: str, tokens: int, mask: BlockMask | None, options: argparse.Namespace
) -> list[Result]:
    """One case; prints as it goes."""
    say(name)
    generator = torch.Generator(device=options.device).manual_seed(0)
    dtype = torch.bfloat16 if options.device != "cpu" else torch.float32
    shape = (1, options.heads, tokens, options.head_dim)
    qkv = tuple(
        torch.randn(shape, generator=generator, device=options.device).to(dtype) for _ in range(3)
    )
    runs = runs_of(qkv, mask, options.granularity)  # type: ignore[arg-type]
    timings = time_interleaved(runs, device=options.device, repeats=options.repeats, seconds=1.0)
    flops = 4 * options.head_dim * options.heads * tokens**2
    if mask is not None:
        flops = mask.flops(options.head_dim, heads=options.heads)
    problem = {"case": name, "tokens": tokens, "heads": options.heads, "dtype": str(dtype)}
    problem |= {"head_dim": options.head_dim, "granularity": options.granularity}
    results, rows = [], []
    for run, timing in timings.items():
        metrics = {"speed_up": timings["native"].median / timing.median}
        if not run.endswith("quantize"):
            metrics["tflops"] = flops / timing.median / 1e12
        results.append(Result(problem, run, timing, metrics))
        tflops = f"{metrics['tflops']:.4g}" if "tflops" in metrics else ""
        rows.append((run, timing, tflops, f"{metrics['speed_up']:.2f}"))
    print_table(name, ("what", "median (p20 to p80)", "TFLOPS", "against native"), rows)
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = Options("triton_codes", __doc__)
    asked.sized("--tokens", [16384, 32768], [128], "dense lengths", type=int, nargs="+")
    asked.sized("--grid", (30, 48, 80), (6, 8, 8), "of STA, in tokens", type=int, nargs=3)
    asked.count("--vsa-tokens", 49152, 128, "of VSA")
    asked.count("--heads", 24, 1, "heads")
    asked.add("--head-dim", type=int, default=128, help="head_dim (128)")
    asked.add(
        "--granularity", choices=GRANULARITIES, default="per_warp", help="of scales (per_warp)"
    )
    asked.count("--repeats", 20, 1, "timed calls of each")
    options = asked.parse(arguments)
    options.grid = tuple(options.grid)
    return options


def bench(options: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    for name, (tokens, mask) in masks(options).items():
        results += bench_case(name, tokens, mask, options)
    return results


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
