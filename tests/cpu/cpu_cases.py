"""Random problems for the C++ backend, and all its results."""

from __future__ import annotations

import torch
from torch import Tensor

from video_attn import BlockMask, attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_case(
    *,
    heads: int = 2,
    kv_heads: int = 2,
    length: int = 300,
    head_dim: int = 40,
    block_size: int = 16,
    keep: float = 0.4,
    dtype: torch.dtype = torch.float32,
    with_lens: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """q, k, v that want gradients, and a mask with other lists for every head."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, length, head_dim, generator=g).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    blocks = -(-length // block_size)
    lens = None
    if with_lens:
        lens = torch.randint(0, block_size + 1, (2, blocks), generator=g, dtype=torch.int32)
    mask = BlockMask.from_dense(
        torch.rand(2, heads, blocks, blocks, generator=g) < keep,
        block_size, block_size, lens, lens, q_len=length, kv_len=length,
    )  # fmt: skip
    return q, k, v, mask


def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, **options: bool) -> list[Tensor]:
    """out, lse, dq, dk, dv of the C++ backend for the loss sum(out * weight) + sum(lse)."""
    out, lse = attention(q, k, v, mask, return_lse=True, backend="cpu", **options)
    weight = torch.linspace(-1, 1, out.shape[-1]).to(out.dtype).expand(out.shape)
    seen = lse.masked_fill(lse.isneginf(), 0).sum()
    grads = torch.autograd.grad((out * weight).sum().float() + seen, (q, k, v))
    return [out.detach(), lse.detach(), *grads]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit."""
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert torch.equal(x, y), f"{name} differs by up to {(x - y).abs().max()}"
        assert not x.isnan().any(), name
