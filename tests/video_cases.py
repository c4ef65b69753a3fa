"""What the tests of video patterns share: where they run, a function's answer with gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from video_attn import BlockMask, attention, use_backend
from video_attn.functional import vsa, vsa_padded
from video_attn.registry import backends

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]


def quick_backend() -> AbstractContextManager[None]:
    """On the CPU the compiled backend, or the reference; not the interpreter, which is slow."""
    names = ("cpu", "reference")
    usable = [b.name for b in backends() if b.name in names and b.available() is None]
    return use_backend(usable[0])


def spy_on_masks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """A list that takes the mask of every attention call of the VSA functions."""
    masks: list[BlockMask] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **options: Any) -> Any:
        masks.append(mask)
        return attention(q, k, v, mask, **options)

    monkeypatch.setattr(vsa, "attention", spy)
    monkeypatch.setattr(vsa_padded, "attention", spy)
    return masks


def random_qkv(
    q_shape: tuple[int, int, int, int],
    kv_heads: int | None = None,
    kv_len: int | None = None,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v and a gradient of the output, [B, H, S, D] each, normally distributed."""
    batch, heads, q_len, head_dim = q_shape
    kv_heads, kv_len = kv_heads or heads, kv_len or q_len
    head_dim_v = head_dim_v or head_dim
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        q_shape,
        (batch, kv_heads, kv_len, head_dim),
        (batch, kv_heads, kv_len, head_dim_v),
        (batch, heads, q_len, head_dim_v),
    ]
    return [torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes]


def answer(
    function: Callable[..., Tensor | tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
) -> oracle.Result:
    """``function(q, k, v)`` -> out, or (out, lse), and the gradients of out."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    result = function(q, k, v)
    out, lse = result if isinstance(result, tuple) else (result, None)
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    return oracle.Result(out.detach(), None if lse is None else lse.detach(), *grads)
