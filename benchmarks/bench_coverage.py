"""What the compiled kernels refuse and Triton takes: causal, other head dims, fp32, odd blocks.

    python benchmarks/bench_coverage.py                 # on a GPU: 8192 tokens, every row
    python benchmarks/bench_coverage.py --rows causal fp32

FlexAttention and torch's kernels get the same tensors. The last column of the summary compares
effective TFLOPS with those of the first row, head dim 128 in bf16 without a mask: a cliff shows.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from cases import Case, make_dense_case, vsa_case
from measure import COLUMNS, rows_of, time_case
from options import Options, run_benchmark
from peers import Provider, dense_flex_peer, dense_peers, efficient_peer, flex_peer, ours_on

from video_attn.tools.bench import (
    Result,
    print_table,
    say,
)

BLOCK = 100  # tokens; no tile of a kernel divides it
PLAIN = "head dim 128"
ROWS: dict[str, dict[str, Any]] = {
    PLAIN: {"head_dim": 128},
    "causal": {"head_dim": 128, "is_causal": True},
    "head dim 72": {"head_dim": 72},
    "head dim 256": {"head_dim": 256},
    "head dims 192, 128": {"head_dim": 192, "head_dim_v": 128},
    "fp32": {"head_dim": 128, "dtype": "float32"},
    f"blocks of {BLOCK}": {"head_dim": 128},
}


def make(row: str, options: argparse.Namespace) -> Case:
    """The case of a row."""
    given = {"dtype": options.dtype, **ROWS[row]}
    if row == f"blocks of {BLOCK}":
        blocks = max(2, options.tokens // BLOCK)
        tokens, kept = blocks * BLOCK, max(1, blocks // 8)
        return vsa_case(tokens, BLOCK, kept, options.heads, device=options.device, **given)
    return make_dense_case(options.tokens, options.heads, device=options.device, **given)


def providers(case: Case, backend: str) -> list[Provider]:
    """Ours on one backend, and everybody who may do the same."""
    if case.mask is not None:
        return [ours_on(backend), flex_peer(case.device), *dense_peers(case.device)]
    found = [ours_on(backend), *dense_peers(case.device), dense_flex_peer(case.device)]
    if case.device.type == "cuda" and case.grad.dtype == torch.float32:
        found.append(efficient_peer())
    return found


def summary(results: dict[str, list[Result]], name: str) -> list[tuple[object, ...]]:
    """(row, pass, our TFLOPS, of those of the plain row)."""
    plain = {r.problem["pass"]: r.metrics["tflops"] for r in results.get(PLAIN, ())
             if r.provider == name}  # fmt: skip
    rows: list[tuple[object, ...]] = []
    for row, timed in results.items():
        for r in timed:
            if r.provider == name:
                rate, direction = r.metrics["tflops"], r.problem["pass"]
                part = f"{rate / plain[direction]:.2f}" if direction in plain else ""
                rows.append((row, direction, f"{rate:.0f}", part))
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = Options("coverage", __doc__)
    asked.add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    asked.sized("--backend", "triton", "cpu", "ours")
    asked.count("--tokens", 8192, 512, "sequence length")
    asked.count("--heads", 16, 2, "heads")
    asked.count("--repeats", 20, 5, "timed calls of each provider")
    asked.switch("--backward", "backward too")
    options = asked.parse(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    options.dtype = "float32" if on_cpu else "bfloat16"
    return options


def bench(options: argparse.Namespace) -> list[Result]:
    results: dict[str, list[Result]] = {}
    for row in options.rows:
        say(row)
        case = make(row, options)
        results[row] = time_case(
            case, providers(case, options.backend), options.repeats, options.backward
        )
        print_table(f"{row}: {options.heads} heads", COLUMNS, rows_of(results[row]))
    name = ours_on(options.backend).name
    columns = ("row", "pass", "effective TFLOPS", f"of {PLAIN}")
    print_table(name, columns, summary(results, name))
    return [result for timed in results.values() for result in timed]


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
