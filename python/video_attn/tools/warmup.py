"""``video-attn warmup``: compiles the Triton kernels of a model before its first step needs them.

Triton keeps what it compiles on disk (``TRITON_CACHE_DIR``, by default ``~/.triton/cache``), under
a key of the kernel's source, its options, the chip and Triton's own version. Versions of this
package and processes can share the folder: none reads the kernels of another source, and files
appear whole.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..device import device_info
from ..kernels.launch import Launch, Saved, Side
from ..kernels.launch_tables import unsupported_arch, unsupported_precision
from ..quantize import QUANTIZED_PRECISIONS, QuantizationOptions, fp8_dtype
from . import UsageError
from .options import positive_int

BLOCKS = {"vsa": 64, "radial": 128, "sta": 384, "dense": None, "causal": None}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Job(NamedTuple):
    """Kernels that one process compiles: those of a pass, or of the choice of blocks of VSA.

    Args:
        part: "forward", "backward" or "blocks". block: tokens of a block; None for dense attention.
        lens: whether blocks may be partly filled.
    """

    arch: str
    part: str
    pattern: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    group: int
    tokens: int
    block: int | None
    lens: bool
    precision: str

    def __str__(self) -> str:
        blocks = "" if self.block is None else f", blocks of {self.block}"
        lens = ", partly filled" if self.lens else ""
        precision = "" if self.precision == "native" else f", {self.precision}"
        return f"{self.part}, {self.pattern}{blocks}{lens}{precision}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dim", type=positive_int, required=True, help="of q and k")
    parser.add_argument("--head-dim-v", type=positive_int, help="default: the same")
    parser.add_argument(
        "--pattern", choices=BLOCKS, action="append", required=True, help="again for several"
    )
    parser.add_argument(
        "--block-size", type=positive_int, help="tokens of a block or tile (default: "
        + ", ".join(f"{name} {size}" for name, size in BLOCKS.items() if size) + ")",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=positive_int, help="of the sequence (default: 96 whole blocks)"
    )
    parser.add_argument("--group", type=positive_int, default=1, help="query heads per key head")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--precision", choices=("native", *QUANTIZED_PRECISIONS), default="native")
    parser.add_argument("--forward-only", action="store_true", help="no backward pass")
    parser.add_argument("--arch", help="sm_90, gfx942, ... (default: that of the GPU here)")
    parser.add_argument("--jobs", type=positive_int, default=os.cpu_count(), help="side by side")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from triton import knobs

    arch = _checked_arch(args)
    jobs = list(_jobs(args, arch))
    console = Console()
    grid = Table("kernels", "launches", "seconds")
    start = time.perf_counter()
    # Interpreted kernels cannot be compiled, and a process that compiles cannot run kernels.
    os.environ.pop("TRITON_INTERPRET", None)
    workers = min(args.jobs, len(jobs))
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        Progress(console=console, transient=True) as bar,
    ):
        done = bar.add_task(f"compile for {arch}", total=len(jobs))
        for job, (count, seconds) in zip(jobs, pool.map(compile_job, jobs), strict=True):
            grid.add_row(str(job), str(count), f"{seconds:.1f}")
            bar.advance(done)
    console.print(grid)
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.1f} s in all, for {arch}; kept in {knobs.cache.dir}", soft_wrap=True)
    return 0


def _checked_arch(args: argparse.Namespace) -> str:
    if args.arch is None and not torch.cuda.is_available():
        raise UsageError("there is no GPU here: name the one to compile for, as in --arch sm_90")
    arch = args.arch or device_info("cuda").arch
    refusal = unsupported_arch(arch)
    if refusal is None and args.precision != "native":
        refusal = unsupported_precision(arch, args.precision)
        if refusal is None and not args.forward_only:
            refusal = f"precision {args.precision} has no backward pass; add --forward-only"
    for name in ("head_dim", "head_dim_v"):
        if (getattr(args, name) or 1) > 256:
            refusal = f"{name} must be at most 256, got {getattr(args, name)}"
    if refusal is not None:
        raise UsageError(refusal)
    return arch


def _jobs(args: argparse.Namespace, arch: str) -> Iterator[Job]:
    for pattern in dict.fromkeys(args.pattern):
        block = BLOCKS[pattern] and (args.block_size or BLOCKS[pattern])
        tokens = args.tokens or 96 * (block or 64)
        parts = ["forward"] if args.forward_only else ["forward", "backward"]
        whole = block is None or tokens % block == 0
        for lens in [False, True] if block else [False]:
            for part in [*parts, "blocks"] if pattern == "vsa" else parts:
                if lens or whole:
                    yield Job(
                        arch, part, pattern, DTYPES[args.dtype], args.head_dim,
                        args.head_dim_v or args.head_dim, args.group, tokens, block, lens,
                        args.precision,
                    )  # fmt: skip


def compile_job(job: Job) -> tuple[int, float]:
    """(launches, seconds) of a job's kernels, compiled or found in the cache."""
    from ..kernels.compile import compile_launch

    start = time.perf_counter()
    launches = kernels_of(job)
    for launch in launches:
        compile_launch(launch, job.arch)
    return len(launches), time.perf_counter() - start


def kernels_of(job: Job) -> list[Launch]:
    """The launches of a job; where they know the strides of rows that follow one another, also
    those for rows of several heads between one another.
    """
    launches = _launches(job)
    packed = [launch for launch in launches if launch.args.get("PACKED")]
    return launches + [replace(x, args={**x.args, "PACKED": False}) for x in packed]


def _launches(job: Job) -> list[Launch]:
    """The launches of a job on meta tensors, as the backend makes them."""
    from ..backends import triton as backend

    q, k = (_meta(1, heads, job.tokens, job.head_dim, dtype=job.dtype) for heads in (job.group, 1))
    v = _meta(1, 1, job.tokens, job.head_dim_v, dtype=job.dtype)
    out = _meta(1, job.group, job.tokens, job.head_dim_v, dtype=job.dtype)
    lse = _meta(1, job.group, job.tokens)
    mask = _mask(job)
    scale, is_causal = job.head_dim**-0.5, job.pattern == "causal"
    if job.part == "blocks":
        return _block_launches(job, k, mask)
    if job.part == "backward":
        dq, dkv = (
            backend.chosen_row(name, mask, q, k, v, out, arch=job.arch) for name in ("dq", "dkv")
        )
        saved = Saved(q, k, v, out, lse, out, None)
        return backend.backward_launches(
            saved, (q, k, v), mask, scale=scale, is_causal=is_causal, dq_row=dq, dkv_row=dkv
        )
    row = backend.chosen_row(
        "forward" if job.precision == "native" else job.precision, mask, q, k, v, arch=job.arch
    )
    if job.precision == "native":
        return backend.forward_launches(
            q, k, v, out, lse, mask, scale=scale, is_causal=is_causal, row=row
        )
    codes, launches = backend.quantize_launches(
        q, k, v, mask, scale=scale, precision=job.precision, options=QuantizationOptions(),
        fp8=fp8_dtype(job.arch),
    )  # fmt: skip
    return launches + backend.quantized_launches(
        codes, out, lse, mask, kv_len=job.tokens, scale=scale, is_causal=is_causal, row=row
    )


def _block_launches(job: Job, k: Tensor, mask: BlockMask | None) -> list[Launch]:
    from ..kernels import block_pool, block_rank

    assert mask is not None and job.block is not None
    side = Side(job.block, job.tokens, mask.kv_block_lens)
    blocks = mask.kv_indices.shape[2]
    mean = _meta(1, 1, blocks, job.head_dim, dtype=job.dtype)
    indices = _meta(1, 1, blocks, max(1, blocks // 8), dtype=torch.int32)
    scores = _meta(1, 1, blocks, blocks)
    return [
        block_pool.block_mean(k, mean, side),
        block_pool.block_mean_backward(mean, k, side),
        block_pool.select_top_k(scores, indices, indices.shape[3], mask.kv_block_lens),
        block_pool.select_top_k(
            scores, indices, indices.shape[3], mask.kv_block_lens, mask.kv_num_blocks
        ),
        block_rank.block_means((k, k, k), (mean, mean, mean), side, side),
        block_rank.block_scores((mean, mean, mean), scores, mean, mask.kv_block_lens, 0.1),
        # without the coarse part, as models take it that were not trained with one
        block_rank.block_means((k, k, None), (mean, mean, None), side, side),
        block_rank.block_scores((mean, mean, None), scores, None, mask.kv_block_lens, 0.1),
        block_rank.add_coarse(k, mean, 1.0, side),
    ]


def _mask(job: Job) -> BlockMask | None:
    if job.block is None:
        return None
    blocks = -(-job.tokens // job.block)
    lens = _meta(1, blocks, dtype=torch.int32) if job.lens else None
    lists = _meta(1, 1, blocks, blocks, dtype=torch.int32)
    return BlockMask.from_indices(
        lists, job.block, job.block, q_len=job.tokens, kv_len=job.tokens,
        q_block_lens=lens, kv_block_lens=lens,
    )  # fmt: skip


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
