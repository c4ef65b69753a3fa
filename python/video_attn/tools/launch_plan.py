"""``video-attn info --plan``: what the launcher of the Hopper forward kernel plans for a problem.

The figures come from the very function by which the launcher plans (csrc/hopper/config.h), on any
machine: no GPU is needed.
"""

from __future__ import annotations

import json
from importlib import import_module

from . import UsageError

ARGUMENTS = ("BATCH", "HEADS", "LENGTH", "HEAD_DIM", "BLOCK_SIZE")
_SXM5 = 132  # multiprocessors of an H100 SXM or H200
_MEANING = {
    "channels": "head dims that the kernel computes; the rest up to them is zero",
    "tile_tokens": "queries of a tile, the work of a block of threads at a time",
    "step_tokens": "keys of a step of its loop",
    "threads": "per block: warpgroups of consumers, and one that loads",
    "stages": "keys or values in flight, each a step",
    "shared_bytes": "shared memory of a block",
    "tiles": "in all",
    "blocks": "of threads; each takes tile after tile",
    "draws_dense_tiles": "1: the next one as it gets free; 0: dense attention has its turns",
}


def launch_plan(
    batch: int, heads: int, length: int, head_dim: int, block_size: int,
    multiprocessors: int = _SXM5,
) -> dict[str, int]:  # fmt: skip
    """The plan of a forward launch.

    Args:
        batch, heads, length, head_dim: of the queries.
        block_size: tokens of a block of the mask, a multiple of 64.
        multiprocessors: of the GPU.

    Raises:
        ValueError: a value outside its range.
        RuntimeError: the component ``planning`` is not here; the message says why.
    """
    from .. import native

    component = native.component("planning")
    if not component.loaded:
        raise RuntimeError(f"component planning: {component.reason}")
    if block_size % 64:
        raise ValueError(f"block_size must be a multiple of 64, got {block_size}")
    planning = import_module("video_attn._planning")
    grain = "fine" if block_size == 64 else "coarse"
    return planning.forward_plan(
        grain, batch=batch, heads=heads, length=length, block_size=block_size, head_dim=head_dim,
        multiprocessors=multiprocessors,
    )  # fmt: skip


def print_plan(problem: list[int], *, as_json: bool) -> int:
    """Prints the plan of ``ARGUMENTS``; returns the exit status.

    Raises:
        UsageError: a value outside its range. RuntimeError: as :func:`launch_plan`.
    """
    try:
        plan = launch_plan(*problem)
    except ValueError as error:
        raise UsageError(f"--plan: {error}") from error
    if as_json:
        print(json.dumps(plan, indent=2))
        return 0
    print(f"Hopper forward pass on {_SXM5} multiprocessors:")
    for name, value in plan.items():
        print(f"{name:>17} {value:>9,}  {_MEANING[name]}")
    return 0
