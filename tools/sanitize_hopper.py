"""The Hopper kernels under compute-sanitizer: python tools/sanitize_hopper.py

    python tools/sanitize_hopper.py --tools memcheck racecheck initcheck

Needs an H100 or H200, and compute-sanitizer of the CUDA toolkit. Runs small problems of every
kernel (both grains and dense, forward and both backward passes, head sizes 64 and 128, partial
blocks, grouped heads, strided tensors) under each tool, and fails when one reports an error.
memcheck finds accesses out of bounds, racecheck races in shared memory, initcheck reads of memory
that nobody wrote, synccheck barriers used wrongly.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?")
LENGTH, VALID = 420, 37  # no multiple of a block; keys of the second block that count


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


def run_problems() -> None:
    """The problems themselves; outputs must be finite where a query sees a key."""
    import torch

    from video_attn import BlockMask, attention

    generator = torch.Generator().manual_seed(0)
    for head_dim in (64, 128):
        for block_size in (64, 128, 192, None):
            q, k, v, grad = (
                torch.randn(2, LENGTH, heads, head_dim, generator=generator)
                .to("cuda", torch.bfloat16)
                .transpose(1, 2)
                for heads in (4, 2, 2, 4)
            )
            mask = None
            if block_size is not None:
                blocks = -(-LENGTH // block_size)
                keep = torch.rand(2, 4, blocks, blocks, generator=generator) < 0.7
                keep[0, 0, 0] = False
                lens = torch.full((1, blocks), block_size, dtype=torch.int32)
                lens[0, 1] = VALID
                mask = BlockMask.from_dense(
                    keep, block_size, block_size, None, lens, q_len=LENGTH, kv_len=LENGTH
                ).to("cuda")
            for deterministic in (False, True):
                a, b, c = (x.detach().requires_grad_() for x in (q, k, v))
                out = attention(a, b, c, mask, backend="hopper", deterministic=deterministic)
                results = (out, *torch.autograd.grad(out, (a, b, c), grad))
                if not all(bool(x.isfinite().all()) for x in results):
                    raise SystemExit(f"error: not finite: head_dim {head_dim}, {block_size}")
    torch.cuda.synchronize()


def check(sanitizer: str, tool: str, limit: float) -> bool:
    """Runs the problems under one tool; prints what it found."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    command += [sys.executable, str(Path(__file__).resolve()), "--problems"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one block per tensor
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        print(f"{tool}: not done after {limit:.0f} s")
        return False
    output = done.stdout + done.stderr
    summary = _SUMMARY.search(output)
    clean = done.returncode == 0 and summary is not None and "0" in summary.groups()
    print(f"{tool}: {summary[0] if summary else 'no summary'}, exit status {done.returncode}")
    if not clean:
        print(output[-8000:])
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["memcheck", "racecheck"])
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each tool (300)")
    parser.add_argument("--problems", action="store_true", help="run the problems, unchecked")
    options = parser.parse_args()
    if options.problems:
        run_problems()
        return 0
    sanitizer = find_sanitizer()
    found = [check(sanitizer, tool, options.limit) for tool in options.tools]
    return 0 if all(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
