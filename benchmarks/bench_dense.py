"""Dense attention: our kernels against torch's, on a GPU or a CPU.

    python benchmarks/bench_dense.py                    # on a GPU: 16384 and 32768 tokens, bf16

Dense attention is the measure of the sparse kernels: what they lose beside it is the price of
following lists.
"""

from __future__ import annotations

import argparse

import torch
from cases import make_dense_case
from measure import COLUMNS, rows_of, time_case
from options import Options, run_benchmark
from peers import backend_names, dense_peers, our_providers

from video_attn.tools.bench import (
    Result,
    print_table,
    say,
)


def bench_length(options: argparse.Namespace, tokens: int) -> list[Result]:
    """One sequence length; prints as it goes."""
    say(f"{tokens} tokens")
    case = make_dense_case(
        tokens, options.heads, options.head_dim, options.dtype, torch.device(options.device)
    )
    providers = [*our_providers(case), *dense_peers(case.device)]
    results = time_case(case, providers, options.repeats, options.backward)
    forward, backward = backend_names(case)
    title = (
        f"{tokens} tokens, {options.heads} heads, head_dim {options.head_dim}, {options.dtype}; "
        f"backend forward {forward}, backward {backward}"
    )
    print_table(title, COLUMNS, rows_of(results))
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = Options("dense", __doc__)
    asked.sized("--tokens", [16384, 32768], [2048], "sequence lengths", type=int, nargs="+")
    asked.count("--heads", 16, 2, "heads")
    asked.add("--head-dim", type=int, default=128, help="head_dim (128)")
    asked.dtype()
    asked.count("--repeats", 20, 5, "timed calls of each provider")
    asked.switch("--backward", "backward too")
    return asked.parse(arguments)


def bench(options: argparse.Namespace) -> list[Result]:
    return [result for tokens in options.tokens for result in bench_length(options, tokens)]


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
