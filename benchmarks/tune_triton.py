"""Finds launch options for the GPU at hand, and prints them as rows of its launch table.

    python benchmarks/tune_triton.py [--kernel forward] [--bytes 2] [--head-dim 128] [--grain 64]
                                     [--arch sm_90 --dry-run] [--jobs 16] [--out FILE.json]

For every row of the table: candidates that fit the chip are compiled side by side, those that spill
much are dropped, the rest is timed in turn on one problem (random lists, an eighth of the key
slots) and must give what the present row gives. Beside each rate stands the one that row_model.py
predicts from the compiled resources. ``--dry-run`` compiles and lists the candidates of any chip
without a GPU, the best by that model first. Paste the printed rows into
``kernels/launch_tables_*.py``. With ``--head-dim 128`` it takes a minute of a GPU and 16 cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compile_cases import DTYPES, HEADS, Case, attention_launch, code_kernels
from compile_matrix import Result, compile_case
from rich.progress import Progress
from row_model import Made, agreement, predicted_rates
from torch import Tensor

from video_attn import BlockMask
from video_attn.backends.triton import (
    backward_launches,
    forward_launches,
    quantize_launches,
    quantized_launches,
)
from video_attn.device import device_info
from video_attn.kernels.launch import Saved, padded, run_launches
from video_attn.kernels.launch_tables import (
    CODE_KERNELS,
    GRAINS,
    HEAD_DIMS,
    ITEMSIZES,
    KERNELS,
    SHARED_MEMORY,
    LaunchRow,
    launch_row,
)
from video_attn.quantize import QuantizationOptions
from video_attn.tools import bench

LENGTH, DENSITY = 16384, 1 / 8
# Bytes of local memory, or vector registers on AMD, that a candidate may spill: a few reloads in a
# step can hide, and on an H100 such rows were among the fastest.
FEW_SPILLS = 128
# Relative error against the present row; rows of codes with other steps round the weights apart.
LIMIT = {1: 8e-2, 2: 2e-2, 4: 1e-4}


class Problem(NamedTuple):
    """Tensors on the GPU, and what the kernels write."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    out: Tensor
    lse: Tensor
    mask: BlockMask
    arch: str


def candidates(case: Case) -> Iterator[LaunchRow]:
    """Rows worth compiling: tiles no larger than the grain, stages that may fit the chip."""
    cdna = case.arch.startswith("gfx9")
    stages = (1, 2) if case.arch.startswith("gfx") else (1, 2, 3, 4)
    vendors = [_vendor(w, m) for w in (0, 2) for m in (16, 32)] if cdna else [()]
    packings = (False, True) if case.itemsize == 2 else (False,)  # strides of codes are known
    sizes = [x for x in (16, 32, 64, 128) if x <= case.grain]
    # On Hopper four warps share products of 64 rows; eight on 64 rows halve what each reuses.
    products = present(case).products
    hopper = case.arch == "sm_90" and (case.itemsize < 4 or products != "ieee")
    coded = case.kernel in CODE_KERNELS
    v_itemsize = 2 if case.kernel == "sage_fp16" else case.itemsize
    for own, step, warps, stage in itertools.product(sizes, sizes, (4, 8), stages):
        if coded and step < 32:  # FP8 products take 32 rows of V
            continue
        if hopper and (own < 64 or step < 32 or stage == 1):
            continue
        if hopper and own != 16 * warps and case.head_dim < 256:
            continue
        shared = step * padded(case.head_dim) * (case.itemsize + v_itemsize) * max(1, stage - 1)
        # Without matrix units for fp32 a product is unrolled into single multiply-adds.
        unrolled = own * step if case.itemsize == 4 and products == "ieee" and not cdna else 0
        if shared <= SHARED_MEMORY[case.arch] and own >= 2 * warps and unrolled <= 2048:
            for vendor, packed in itertools.product(vendors, packings):
                yield LaunchRow(own, step, warps, stage, vendor, packed, products)


def _vendor(waves: int, matrix: int) -> tuple[tuple[str, int], ...]:
    options = (("waves_per_eu", waves), ("matrix_instr_nonkdim", matrix))
    return tuple((name, x) for name, x in options if x)


def compiled(cases: Sequence[Case], jobs: int) -> dict[Case, list[tuple[LaunchRow, Result]]]:
    """Candidates of each case that fit and hardly spill; where all spill, those that spill least.

    The present row is among them, whatever it spills.
    """
    rows = {case: list(dict.fromkeys([present(case), *candidates(case)])) for case in cases}
    pairs = [(case, row) for case in cases for row in rows[case]]
    each = zip(*pairs, strict=True)
    results = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, Progress() as bar:
        done = bar.add_task("compile", total=len(pairs))
        for pair, result in zip(pairs, pool.map(compile_case, *each), strict=True):
            results[pair] = result
            bar.advance(done)
    kept = {}
    for case in cases:
        fitting = [(row, results[case, row]) for row in rows[case] if results[case, row].fits]
        if not fitting:
            raise RuntimeError(f"no candidate fits {case}")
        limit = max(FEW_SPILLS, min(x.spills for _, x in fitting))
        kept[case] = [(row, x) for row, x in fitting if x.spills <= limit or row == present(case)]
    return kept


def present(case: Case) -> LaunchRow:
    """The row of the table."""
    return launch_row(case.arch, case.kernel, case.head_dim, case.itemsize, case.grain)


def problem(case: Case) -> Problem:
    """A random problem for a case, its forward pass done with the present row."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (1, HEADS, LENGTH, case.head_dim)
    q, k, v, grad_out = (
        torch.randn(shape, generator=generator, device="cuda").to(DTYPES[case.itemsize])
        for _ in range(4)
    )
    blocks = LENGTH // case.grain
    kept = max(1, int(blocks * DENSITY))
    order = torch.rand(1, HEADS, blocks, blocks, generator=generator, device="cuda").argsort(-1)
    lists = order[..., :kept].sort(-1).values.int()
    mask = BlockMask.from_indices(lists, case.grain, case.grain, q_len=LENGTH, kv_len=LENGTH)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    row = launch_row(case.arch, "forward", case.head_dim, max(2, case.itemsize), case.grain)
    options: dict[str, Any] = {"scale": case.head_dim**-0.5, "is_causal": False, "row": row}
    run_launches(forward_launches(q, k, v, out, lse, mask, **options), q.device)
    return Problem(q, k, v, grad_out, out, lse, mask, case.arch)


def runner(case: Case, x: Problem, row: LaunchRow) -> tuple[Any, Tensor]:
    """(call that launches only the kernel, a tensor that it fills), what it needs being done."""
    options: dict[str, Any] = {"scale": case.head_dim**-0.5, "is_causal": False}
    filled, lse = torch.empty_like(x.out), torch.empty_like(x.lse)
    if case.kernel in CODE_KERNELS:
        codes, launches = quantize_launches(
            x.q, x.k, x.v, x.mask, scale=options["scale"], precision=case.kernel,
            options=QuantizationOptions(),
        )  # fmt: skip
        launches += quantized_launches(
            codes, filled, lse, x.mask, kv_len=LENGTH, row=row, **options
        )
    elif case.kernel == "forward":
        launches = forward_launches(x.q, x.k, x.v, filled, lse, x.mask, row=row, **options)
    else:
        rows = {
            f"{name}_row": launch_row(x.arch, name, case.head_dim, case.itemsize, case.grain)
            for name in ("dq", "dkv")
        }
        rows[f"{case.kernel}_row"] = row
        saved = Saved(x.q, x.k, x.v, x.out, x.lse, x.grad_out, None)
        grads = tuple(torch.empty_like(t) for t in (x.q, x.k, x.v))
        launches = backward_launches(saved, grads, x.mask, **options, **rows)
        filled = grads[0] if case.kernel == "dq" else grads[1]
    run_launches(launches, x.q.device)
    kernel = "forward" if case.kernel in CODE_KERNELS else case.kernel
    return attention_launch(launches, kernel).run, filled


def tune(case: Case, rows: Sequence[tuple[LaunchRow, Result]], repeats: int) -> list[bench.Result]:
    """Times the candidates of a case; fastest first."""
    x = problem(case)
    expected = runner(case, x, present(case))[1].clone()
    calls = {}
    for row, _ in rows:
        call, filled = runner(case, x, row)
        bench.require_correct(f"{case} {row}", filled, expected, LIMIT[case.itemsize])
        calls[text(row)] = call
    timings = bench.time_interleaved(calls, device="cuda", repeats=repeats, warmup=1)
    flops = x.mask.flops(case.head_dim) * {"dq": 1.5, "dkv": 2}.get(case.kernel, 1)
    results = []
    for (row, made), rate in zip(rows, predictions(case, rows), strict=True):
        timing = timings[text(row)]
        metrics = {
            "tflops": flops / timing.median / 1e12,
            "registers": made.registers,
            "spills": made.spills,
            "shared_bytes": made.shared,
        }
        if rate is not None:
            metrics["predicted"] = rate
        results.append(bench.Result(case._asdict(), text(row), timing, metrics))
    return sorted(results, key=lambda result: result.timing.median)


def predictions(case: Case, rows: Sequence[tuple[LaunchRow, Result]]) -> Sequence[float | None]:
    """The predicted rates of the rows, that of the best being 1; None where there is no model."""
    made = [(row, Made(x.registers, x.spills, x.shared)) for row, x in rows]
    return predicted_rates(made, case.arch) or [None] * len(rows)


def show(case: Case, best: Sequence[bench.Result]) -> None:
    """The three fastest rows, and how well the model ranked all."""
    for result in best[:3]:
        print(*case[1:5], result.provider, result.timing, result.metrics, sep="\t")
    if len(best) > 1 and all("predicted" in x.metrics for x in best):
        predicted, rates = ([x.metrics[name] for x in best] for name in ("predicted", "tflops"))
        correlation, loss = agreement(predicted, rates)
        print(f"\tmodel: rank correlation {correlation:.2f}, its choice loses {loss:.1%}")


def text(row: LaunchRow) -> str:
    """A row as it stands in a table."""
    vendor = "".join(f", {name}={x}" for name, x in row.vendor) + ", packed" * row.packed
    return f"({row.own}, {row.step}, {row.num_warps}, {row.num_stages}{vendor})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--kernel", choices=(*KERNELS, *CODE_KERNELS), help="default: all of --bytes"
    )
    parser.add_argument("--bytes", type=int, choices=(1, *ITEMSIZES), help="of a number; 1: codes")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS)
    parser.add_argument("--grain", type=int, choices=GRAINS)
    parser.add_argument("--arch", choices=tuple(SHARED_MEMORY), help="default: that of the GPU")
    parser.add_argument("--dry-run", action="store_true", help="compile only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiles side by side")
    parser.add_argument("--repeats", type=int, default=20, help="of every timing")
    parser.add_argument("--out", type=Path, help="also write a JSON record")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU: --dry-run --arch ARCH lists the candidates")
    arch = options.arch or device_info("cuda").arch
    coded = options.kernel in CODE_KERNELS
    itemsize = options.bytes or (1 if coded else 2)
    if options.kernel and coded != (itemsize == 1):
        parser.error(f"--kernel {options.kernel} has no numbers of {itemsize} bytes")
    kernels = code_kernels(arch) if itemsize == 1 else KERNELS
    cases = [
        Case(arch, kernel, itemsize, head_dim, grain, "steps")
        for kernel in ([options.kernel] if options.kernel else kernels)
        for head_dim in ([options.head_dim] if options.head_dim else HEAD_DIMS)
        for grain in ([options.grain] if options.grain else GRAINS)
    ]
    results: list[bench.Result] = []
    for case, rows in compiled(cases, options.jobs).items():
        if options.dry_run:
            rated = zip(predictions(case, rows), rows, strict=True)
            for rate, (row, x) in sorted(rated, key=lambda found: -(found[0] or 0)):
                shown = "" if rate is None else f"{rate:.2f}"
                print(*case[1:5], text(row), x.registers, x.spills, x.shared, shown, sep="\t")
            continue
        best = tune(case, rows, options.repeats)
        results += best
        show(case, best)
    if options.out and results:
        bench.write_record(bench.Record.of("tune_triton", results, "cuda"), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
