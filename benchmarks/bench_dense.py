"""Dense attention: our kernels against torch's, on a GPU or a CPU.

    python benchmarks/bench_dense.py                    # on a GPU: 16384 and 32768 tokens, bf16

Dense attention is the measure of the sparse kernels: what they lose beside it is the price of
following lists.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cases import DTYPES, make_dense_case
from measure import COLUMNS, rows_of, time_case
from peers import backend_names, dense_peers, our_providers

from video_attn.tools.bench import (
    Record,
    Result,
    WrongResultError,
    print_table,
    record_path,
    say,
    write_record,
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--device", default="cuda" if gpu else "cpu", help="default: cuda if there, else cpu")
    add("--tokens", type=int, nargs="+", help="sequence lengths (16384 32768; on a CPU 2048)")
    add("--heads", type=int, help="heads (16; on a CPU 2)")
    add("--head-dim", type=int, default=128, help="head_dim (128)")
    add("--dtype", choices=list(DTYPES), help="bfloat16; on a CPU float32")
    add("--repeats", type=int, help="timed calls of each provider (20; on a CPU 5)")
    add("--backward", action=argparse.BooleanOptionalAction, default=True, help="backward too")
    add("--output", type=Path, help="JSON record (benchmarks/results/dense_MODEL.json)")
    options = parser.parse_args(arguments)
    kind = torch.device(options.device).type
    for name, on_gpu, small in (
        ("tokens", [16384, 32768], [2048]),
        ("heads", 16, 2),
        ("repeats", 20, 5),
        ("dtype", "bfloat16", "float32"),
        ("output", *[record_path("dense", options.device)] * 2),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if kind == "cpu" else on_gpu)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    results: list[Result] = []
    try:
        for tokens in options.tokens:
            results += bench_length(options, tokens)
    except WrongResultError as error:
        print(f"error: {error}")
        return 1
    write_record(Record.of("bench_dense", results, options.device), options.output)
    print(f"record: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
