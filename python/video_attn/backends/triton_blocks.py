"""Block means and exact top-k by Triton kernels; a part of backend ``triton``."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from ..calls import BlockOps, Side
from ..kernels.launch import run_launches
from ..kernels.launch_tables import unsupported_arch


def _refusal(device_type: str, arch: str) -> str | None:
    if device_type != "cuda":
        return f"device {device_type} is not a GPU"
    if not find_spec("triton"):
        return "triton is not installed (pip install triton)"
    return unsupported_arch(arch)


def _block_mean(x: Tensor, mean: Tensor, side: Side) -> None:
    from ..kernels import block_pool

    run_launches([block_pool.block_mean(x, mean, side)], x.device)


def _block_mean_backward(grad: Tensor, dx: Tensor, side: Side) -> None:
    from ..kernels import block_pool

    run_launches([block_pool.block_mean_backward(grad, dx, side)], grad.device)


def _select_top_k(scores: Tensor, indices: Tensor, top_k: int, key_lens: Tensor | None) -> None:
    from ..kernels import block_pool

    run_launches([block_pool.select_top_k(scores, indices, top_k, key_lens)], scores.device)


BLOCK_OPS = BlockOps(_refusal, _block_mean, _block_mean_backward, _select_top_k)
