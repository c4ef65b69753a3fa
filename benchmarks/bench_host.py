"""What one call costs the host until it returns: Python, dispatch, launches.

    python benchmarks/bench_host.py

The problems are so small that the GPU is done before the host is: a model whose layers are short
waits for this time. On a CPU the figures hold the computation too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from cases import Case, make_dense_case, vsa_case
from measure import reason_of
from options import Options, run_benchmark
from torch import Tensor

from video_attn import attention, sageattn, sliding_tile
from video_attn.calls import problem_of
from video_attn.registry import Backend, backends
from video_attn.tools.bench import (
    Result,
    Timing,
    print_table,
    say,
)
from vsa import video_sparse_attn

BLOCK, TOP_K = 64, 2


def calls_of(dense: Case, sparse: Case) -> dict[str, dict[str, Callable[[], object]]]:
    """Name of a table -> what is called."""
    q, k, v = dense.quiet
    a, b, c = sparse.quiet
    full = torch.full((a.shape[2] // BLOCK,), BLOCK, dtype=torch.int32, device=a.device)
    side = round((a.shape[2] // BLOCK) ** 0.5)
    grid = (4, 4 * side, 4 * (a.shape[2] // BLOCK // side))
    out = attention(*dense.tensors)
    tables: dict[str, dict[str, Callable[[], object]]] = {"dense": {}, "lists": {}}
    for backend in backends():
        for name, case in (("dense", dense), ("lists", sparse)):
            if _serves(backend, case):
                run = partial(attention, *case.quiet, case.mask, backend=backend.name)
                tables[name][f"attention, {backend.name}"] = run
    tables["dense"]["torch SDPA"] = partial(F.scaled_dot_product_attention, q, k, v)
    tables["dense"]["attention, forward of a training step"] = partial(attention, *dense.tensors)
    tables["dense"]["attention, backward"] = partial(_backward, out, dense)
    tables["dense"]["sageattn"] = partial(sageattn, q, k, v)
    tables["whole calls"] = {
        "vsa.video_sparse_attn, no sizes": partial(video_sparse_attn, a, b, c, None, TOP_K, BLOCK),
        "vsa.video_sparse_attn, full tiles as sizes": partial(
            video_sparse_attn, a, b, c, full, TOP_K, BLOCK
        ),
        "video_attn.sliding_tile": partial(sliding_tile, a, b, c, grid, (1, 1, 1), tile=(4, 4, 4)),
    }
    return tables


def _serves(backend: Backend, case: Case) -> bool:
    problem = problem_of("forward", *case.quiet, case.mask)
    return backend.name != "reference" and backend.refusal(problem) is None


def _backward(out: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, case.tensors, case.grad, retain_graph=True)


def time_host(run: Callable[[], object], device: torch.device, repeats: int) -> Timing:
    """Seconds until ``run`` returns; the device is idle when it begins."""
    samples = []
    for n in range(repeats + 10):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if n >= 10:
            samples.append(time.perf_counter() - start)
    return Timing(tuple(samples))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = Options("host", __doc__)
    asked.add("--tokens", type=int, default=512, help="sequence length (512)")
    asked.dtype()
    asked.count("--repeats", 300, 30, "timed calls of each")
    options = asked.parse(arguments)
    if options.tokens % BLOCK or options.tokens < TOP_K * BLOCK:
        asked.parser.error(f"--tokens must be a multiple of {BLOCK}, at least {TOP_K * BLOCK}")
    return options


def bench(options: argparse.Namespace) -> list[Result]:
    device = torch.device(options.device)
    dense = make_dense_case(options.tokens, 2, 64, options.dtype, device)
    sparse = vsa_case(options.tokens, BLOCK, TOP_K, 2, 64, options.dtype, device)
    results: list[Result] = []
    for table, calls in calls_of(dense, sparse).items():
        rows = []
        for name, call in calls.items():
            say(f"{table}: {name}")
            problem = {**dense.problem, "call": table}
            try:
                timing = time_host(call, device, options.repeats)
            except RuntimeError as error:
                results.append(Result(problem, name, None, failure=reason_of(error)))
                continue
            microseconds = {"median_us": timing.median * 1e6}
            results.append(Result(problem, name, timing, microseconds))
            rows.append((name, *(f"{timing.quantile(x) * 1e6:.0f}" for x in (0.5, 0.2, 0.8))))
        print_table(f"{table}: host time of one call", ("what", "us", "p20", "p80"), rows)
    return results


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
