"""The GPU kernels under compute-sanitizer: python tools/sanitize_hopper.py

    python tools/sanitize_hopper.py --tools racecheck --backends hopper cuda_sage

Needs a GPU, and compute-sanitizer of the CUDA toolkit; `hopper` wants an H100 or H200. Runs small
problems of every kernel of a backend (both grains and dense, forward and backward, head sizes 64
and 128, partial blocks, rows without keys, grouped heads, strided tensors) under each tool, and
fails when one reports an error. memcheck finds accesses out of bounds, racecheck races in shared
memory, initcheck reads of memory that nobody wrote, synccheck barriers used wrongly. A tool that is
not done in time is ended with all that it started, and what it has found by then is shown.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from video_attn import BlockMask

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("hopper", "cuda_sage", "triton")
PRECISIONS = ("sage_fp16", "sage_fp8", "fp8")
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?")
LENGTH, VALID = 420, 37  # no multiple of a block; keys of the second block that count
HEADS, KV_HEADS = 2, 1


def find_sanitizer() -> str:
    """compute-sanitizer, from PATH or the toolkit.

    Raises:
        SystemExit: it is in neither.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if found is None:
        raise SystemExit("error: compute-sanitizer not found: put it in PATH or set CUDA_HOME")
    return found


# -- the problems ----------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Of one call: tensors [1, heads, LENGTH, head_dim] in [1, LENGTH, heads, head_dim] memory."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    mask: BlockMask | None


def inputs(head_dims: tuple[int, ...], block_sizes: tuple[int | None, ...]) -> Iterator[Inputs]:
    """Every head dim with every block size; None is dense attention."""
    import torch

    from video_attn import BlockMask

    generator = torch.Generator().manual_seed(0)
    for head_dim in head_dims:
        for block_size in block_sizes:
            q, k, v, grad = (
                torch.randn(1, LENGTH, heads, head_dim, generator=generator)
                .to(torch.bfloat16)
                .to("cuda")
                .transpose(1, 2)
                for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
            )
            mask = None
            if block_size is not None:
                blocks = -(-LENGTH // block_size)
                keep = torch.rand(1, HEADS, blocks, blocks, generator=generator) < 0.7
                keep[0, 0, 0] = False
                lens = torch.full((1, blocks), block_size, dtype=torch.int32)
                lens[0, 1] = VALID
                mask = BlockMask.from_dense(
                    keep, block_size, block_size, None, lens, q_len=LENGTH, kv_len=LENGTH
                ).to("cuda")
            yield Inputs(q, k, v, grad, mask)


def run_native(backend: str, deterministic: tuple[bool, ...]) -> Iterator[Tensor]:
    """Forward and backward: the outputs and gradients."""
    import torch

    from video_attn import attention

    for x in inputs((64, 128), (64, 128, 192, None)):
        for repeatable in deterministic:
            q, k, v = (y.detach().requires_grad_() for y in (x.q, x.k, x.v))
            out = attention(q, k, v, x.mask, backend=backend, deterministic=repeatable)
            yield out
            yield from torch.autograd.grad(out, (q, k, v), x.grad)


def run_quantized(backend: str, block_sizes: tuple[int | None, ...]) -> Iterator[Tensor]:
    """Forward, every recipe: quantizing and attending."""
    from video_attn import attention

    for x in inputs((64, 128), block_sizes):
        for precision in PRECISIONS:
            yield attention(x.q, x.k, x.v, x.mask, backend=backend, precision=precision)


def run_problems(backend: str) -> None:
    """The problems of a backend; results must be finite (a row without keys gives zeros)."""
    results: Iterator[Tensor]
    if backend == "hopper":
        results = run_native(backend, (False, True))
    elif backend == "cuda_sage":
        results = run_quantized(backend, (64, 128, None))
    else:
        results = chain(run_native(backend, (False,)), run_quantized(backend, (64, None)))
    count = 0
    for result in results:
        count += 1
        if not bool(result.isfinite().all()):
            raise SystemExit(f"error: result {count} of {backend} is not finite")
    print(f"{count} results of {backend}")


# -- the tools -------------------------------------------------------------------------------------


def check(sanitizer: str, tool: str, backend: str, limit: float) -> bool:
    """Runs the problems of a backend under one tool; prints what it found."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--show-backtrace", "no"]
    command += [sys.executable, str(Path(__file__).resolve()), "--problems", backend]
    name, began = f"{backend}, {tool}", time.monotonic()
    status, output = run_to_end(command, limit)
    summary = _SUMMARY.search(output)
    clean = status == 0 and summary is not None and "0" in summary.groups()
    found = summary[0] if summary else "no summary"
    how = f"not done after {limit:.0f} s" if status is None else f"exit status {status}"
    print(f"{name}: {found}, {how}, {time.monotonic() - began:.0f} s", flush=True)
    if not clean:
        print("\n".join(list_reports(output)) + "\n...\n" + output[-2000:], flush=True)
    return clean


def run_to_end(command: list[str], limit: float) -> tuple[int | None, str]:
    """(exit status, output) of a command; status None where it was ended after ``limit`` seconds.

    It has a session of its own, which is ended as a whole: a tool's child would keep running, and
    keep the pipe of the output open.
    """
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one block per tensor
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return None, output
    return process.returncode, output


def list_reports(output: str) -> list[str]:
    """The different reports of a tool, each once, with how often it came; threads are left out."""
    counts = Counter(
        " ".join(
            line.removeprefix("=========").strip() for line in report if " by thread" not in line
        )
        for report in _reports(output.splitlines())
    )
    return [f"{count} x {report}" for report, count in counts.items()]


def _reports(lines: Iterable[str]) -> Iterator[list[str]]:
    """Lines of the tool that belong together; it puts an empty one of its own between reports."""
    report: list[str] = []
    for line in lines:
        if line.startswith("========= ") and line.strip("= "):
            report.append(line)
        elif report:
            yield report
            report = []
    if report:
        yield report


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each run (300)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--problems", choices=BACKENDS, help="run a backend's problems, unchecked")
    options = parser.parse_args()
    if options.problems:
        run_problems(options.problems)
        return 0
    sanitizer = find_sanitizer()
    with ThreadPoolExecutor(max_workers=options.jobs) as pool:
        runs = [
            pool.submit(check, sanitizer, tool, backend, options.limit)
            for backend in options.backends
            for tool in options.tools
        ]
        return int(not all(run.result() for run in runs))


if __name__ == "__main__":
    raise SystemExit(main())
