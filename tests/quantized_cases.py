"""Problems and measures that the tests of quantized attention share."""

from __future__ import annotations

from typing import Any

import token_masks
import torch
from torch import Tensor

from video_attn import BlockMask, attention
from video_attn.quantize import QuantizationOptions

# Relative L2 error against exact attention, on normal data. FP8 rounds each of q, k, P and v by
# 2.65 % (rms, 3 digits of mantissa), and four such errors add up to 5.3 %: below that no kernel can
# be that rounds all four.
ERROR_BOUND = {"sage_fp16": 0.02, "sage_fp8": 0.05, "fp8": 0.058}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (200, 200),
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    q = normal(batch, heads[0], lengths[0], dims[0], seed=1, dtype=dtype)
    k = normal(batch, heads[1], lengths[1], dims[0], seed=2, dtype=dtype)
    return q, k, normal(batch, heads[1], lengths[1], dims[1], seed=3, dtype=dtype)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def check(precision: str, got: Tensor, exact: Tensor, bound: float | None = None) -> None:
    """``got`` is finite and as near to ``exact`` as the precision allows, with exact zeros for rows
    of nothing.
    """
    assert got.isfinite().all()
    blind = (exact == 0).all(-1)
    assert (got[blind] == 0).all()
    assert relative_error(got, exact) <= (ERROR_BOUND[precision] if bound is None else bound)


def tokens_of(mask: BlockMask | None, q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor:
    if mask is not None:
        return mask.to_token_mask()
    make = token_masks.causal_tokens if is_causal else token_masks.dense_tokens
    return make(q.shape[2], k.shape[2])


def random_mask(
    sizes: tuple[int, int], lengths: tuple[int, int], heads: int, lens: bool = False, batch: int = 1
) -> BlockMask:
    """Random lists with an empty row; ``lens``: random valid lengths, one block without any."""
    (q_size, kv_size), generator = sizes, torch.Generator().manual_seed(sum(sizes))
    nq, nk = -(-lengths[0] // q_size), -(-lengths[1] // kv_size)
    keep = torch.rand(batch, heads, nq, nk, generator=generator) < 0.5
    keep[:, :, 0] = nq == 1
    q_lens = kv_lens = None
    if lens:
        q_lens = torch.randint(1, q_size + 1, (batch, nq), generator=generator, dtype=torch.int32)
        kv_lens = torch.randint(1, kv_size + 1, (batch, nk), generator=generator, dtype=torch.int32)
        kv_lens[:, nk // 2] = 0
    return BlockMask.from_dense(
        keep, q_size, kv_size, q_lens, kv_lens, q_len=lengths[0], kv_len=lengths[1]
    )


MASKS: dict[str, tuple[tuple[int, int] | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "dense-one-key": (None, {"lengths": (70, 1)}),
    "dense-63": (None, {"lengths": (65, 63)}),
    "dense-65": (None, {"lengths": (63, 65)}),
    "dense-one-query": (None, {"lengths": (1, 300)}),
    "lists-64": ((64, 64), {"lengths": (300, 400)}),
    "lists-64-gqa": ((64, 64), {"lengths": (200, 333), "heads": (4, 2)}),
    "lists-128-64": ((128, 64), {"lengths": (300, 300), "dims": (40, 24)}),
    "lists-64-128-lens": ((64, 128), {"lengths": (256, 520), "dims": (72, 72)}),
    "lists-384-lens": ((384, 384), {"lengths": (700, 800)}),
    "lists-100-lens": ((100, 100), {"lengths": (290, 310), "dims": (32, 96)}),
    "lists-16": ((16, 16), {"lengths": (90, 90), "heads": (2, 1)}),
    "batch-lens": ((64, 64), {"lengths": (192, 256), "batch": 2}),
}


def problem(name: str) -> tuple[Tensor, Tensor, Tensor, BlockMask | None]:
    """q, k, v and the mask of one of ``MASKS``."""
    blocks, shape = MASKS[name]
    q, k, v = qkv(**shape)
    if blocks is None:
        return q, k, v, None
    batch = shape.get("batch", 1)
    return q, k, v, random_mask(blocks, shape["lengths"], q.shape[1], "lens" in name, batch)


def check_same(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], bound: float = 6e-3
) -> None:
    """(out, lse) of a kernel is what the definition says, but for the order of sums.

    A mean that differs in its last bit may move a few numbers, which lie between two codes, from
    one code to the next: little on the whole, much for the row it happens in.
    """
    out, lse = expected
    assert got[0].dtype == out.dtype and got[1].dtype == torch.float32
    assert torch.equal(got[1].isneginf(), lse.isneginf())
    blind = lse.isneginf()
    assert (got[0][blind] == 0).all()
    assert not blind.all() and float(out.norm()) > 0
    assert relative_error(got[0], out) < bound
    shift = (got[1] - lse)[~blind]
    assert float(shift.abs().max()) < 0.1 and float(shift.square().mean().sqrt()) < bound


def check_kernel(
    backend: str, precision: str, name: str, options: QuantizationOptions | None = None
) -> None:
    """A backend against the definition on one of ``MASKS``."""
    q, k, v, mask = problem(name)
    chosen = {"precision": precision, "quantization": options, "return_lse": True}
    expected = attention(q, k, v, mask, backend="reference", **chosen)  # type: ignore[call-overload]
    check_same(attention(q, k, v, mask, backend=backend, **chosen), expected)  # type: ignore[call-overload]
