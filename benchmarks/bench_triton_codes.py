"""INT8 and FP8 attention by the Triton kernels: quantizing, attention over codes, and both.

    python benchmarks/bench_triton_codes.py             # on a GPU: dense, STA and VSA, head_dim 128

A result that is not near that of the bf16 kernel is not timed. TFLOPS count attended pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from video_attn import BlockMask, VideoLayout
from video_attn.backends.triton import forward_launches, quantize_launches, quantized_launches
from video_attn.device import device_info
from video_attn.kernels.launch import run_launches
from video_attn.kernels.launch_tables import CODE_KERNELS, launch_row, unsupported_precision
from video_attn.patterns.sliding_tile import sliding_tile_mask
from video_attn.quantize import GRANULARITIES, QuantizationOptions
from video_attn.tools.bench import (
    Record,
    Result,
    WrongResultError,
    print_table,
    record_path,
    require_correct,
    say,
    time_interleaved,
    write_record,
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--device", default="cuda" if gpu else "cpu", help="default: cuda if there, else cpu")
    add("--tokens", type=int, nargs="+", help="dense lengths (16384 32768; on a CPU 128)")
    add("--grid", type=int, nargs=3, help="of STA, in tokens (30 48 80; on a CPU 6 8 8)")
    add("--vsa-tokens", type=int, help="of VSA (49152; on a CPU 128)")
    add("--heads", type=int, help="heads (24; on a CPU 1)")
    add("--head-dim", type=int, default=128, help="head_dim (128)")
    add("--granularity", choices=GRANULARITIES, default="per_warp", help="of scales (per_warp)")
    add("--repeats", type=int, help="timed calls of each (20; on a CPU 1)")
    add("--output", type=Path, help="JSON record (benchmarks/results/triton_codes_MODEL.json)")
    options = parser.parse_args(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    for name, large, small in (
        ("tokens", [16384, 32768], [128]),
        ("grid", (30, 48, 80), (6, 8, 8)),
        ("vsa_tokens", 49152, 128),
        ("heads", 24, 1),
        ("repeats", 20, 1),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if on_cpu else large)
    options.grid = tuple(options.grid)
    options.output = options.output or record_path("triton_codes", options.device)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    results: list[Result] = []
    try:
        for name, (tokens, mask) in masks(options).items():
            results += bench_case(name, tokens, mask, options)
    except WrongResultError as error:
        print(f"error: {error}")
        return 1
    write_record(Record.of("bench_triton_codes", results, options.device), options.output)
    print(f"record: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
