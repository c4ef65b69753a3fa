"""The first training step with VSA: seconds that Triton takes to compile its kernels.

    python benchmarks/bench_first_call.py

Each step runs in a process of its own, after torch and the GPU are up: with an empty cache folder,
with what that step left in it, and with what ``video-attn warmup`` put into another, which is timed
too. Without a GPU only warmup is timed, for the chip that --arch names.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch
from options import Options, run_benchmark

from video_attn.tools.bench import Result, Timing, print_table, say

BLOCK, BLOCKS, TOP_K, HEADS = 64, 96, 8, 2


def two_steps(head_dim: int) -> tuple[float, float]:
    """Seconds of a first and a second step, forward and backward, blocks partly filled or not."""
    from vsa import video_sparse_attn

    shape = (1, HEADS, BLOCK * BLOCKS, head_dim)
    tensors = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    sizes = torch.full((BLOCKS,), BLOCK, dtype=torch.int32, device="cuda")
    sizes[-1] = BLOCK // 2
    found = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for given in (None, sizes):
            out = video_sparse_attn(*tensors, given, TOP_K, BLOCK)
            out.sum().backward()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found[0], found[1]


@contextmanager
def environment(**given: str) -> Iterator[None]:
    """Environment variables that the processes of the block inherit."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def fresh_process_steps(head_dim: int, folder: str, backend: str) -> tuple[float, float]:
    """:func:`two_steps` in a new process with a cache folder."""
    with (
        environment(TRITON_CACHE_DIR=folder, VIDEO_ATTN_BACKEND=backend),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(two_steps, head_dim).result()


def warmup_seconds(options: argparse.Namespace, folder: str) -> float:
    """Seconds of ``video-attn warmup`` for the same step, its start too."""
    command = [sys.executable, "-m", "video_attn.cli", "warmup", "--pattern", "vsa"]
    command += ["--head-dim", str(options.head_dim), "--jobs", str(options.jobs)]
    if options.device == "cpu":
        command += ["--arch", options.arch]
    start = time.perf_counter()
    with environment(TRITON_CACHE_DIR=folder):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def bench(options: argparse.Namespace) -> list[Result]:
    found: dict[str, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory() as cold, tempfile.TemporaryDirectory() as warm:
        if options.device != "cpu":
            for name in ("an empty cache", "the kernels on disk"):
                say(name)
                found[f"steps with {name}"] = fresh_process_steps(options.head_dim, cold, "triton")
        say("warmup")
        found[f"video-attn warmup, {options.jobs} processes"] = (warmup_seconds(options, warm),)
        if options.device != "cpu":
            say("after warmup")
            found["steps after warmup"] = fresh_process_steps(options.head_dim, warm, "triton")
    problem = {"pattern": "vsa", "head_dim": options.head_dim, "block": BLOCK, "jobs": options.jobs}
    if options.device == "cpu":
        problem["arch"] = options.arch
    results = []
    for name, (first, *later) in found.items():
        metrics = {"second_ms": later[0] * 1e3} if later else {}
        results.append(Result(problem, name, Timing((first,)), metrics))
    rows = [
        (x.provider, f"{x.timing.median:.1f}", f"{x.metrics.get('second_ms', 0):.1f}")
        for x in results
        if x.timing
    ]
    print_table("VSA, forward and backward", ("what", "seconds", "the same again, ms"), rows)
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = Options("first_call", __doc__)
    asked.sized("--head-dim", 128, 64, "head_dim", type=int)
    asked.add("--arch", default="sm_90", help="what to compile for without a GPU (sm_90)")
    asked.add("--jobs", type=int, default=os.cpu_count(), help="processes of warmup (all cores)")
    return asked.parse(arguments)


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
