"""Options of single calls on ranks; run by the pool."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import close, group_of

from video_attn import BlockMask, attention, use_backend
from video_attn.distributed import Shards, sequence_parallel_attention
from video_attn.distributed.ulysses import share_heads


def parts(group: Any, heads: int = 4, kv_heads: int = 4, dtype: Any = torch.float32) -> Any:
    """(whole q, k, v, parts of this rank, mask, shards) of 96 tokens."""
    generator = torch.Generator().manual_seed(7)
    whole = [
        torch.randn(2, n, 96, 16, generator=generator).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    ]
    keep = torch.rand(2, heads, 6, 6, generator=generator) < 0.5
    mask = BlockMask.from_dense(keep, 16, 16)
    shards = Shards.even(96, dist.get_world_size(group))
    own = [shards.take(x, dist.get_rank(group), 2) for x in whole]
    return whole, own, mask, shards


def heads(group: Any) -> None:
    """Head counts that the ranks cannot share: fewer than ranks, groups that are torn, one."""
    rank = dist.get_rank(group)
    for q_heads, kv_heads in ((3, 3), (1, 1), (6, 2), (9, 3), (10, 2), (5, 1)):
        whole, own, mask, shards = parts(group, q_heads, kv_heads)
        whole, own = ([x.requires_grad_() for x in xs] for xs in (whole, own))
        expected = attention(*whole, mask)
        wanted = torch.autograd.grad(expected.sum(), whole)
        for chunks in (None, 1, 3):
            out = sequence_parallel_attention(*own, mask, group=group, head_chunks=chunks)
            close("out", out, shards.take(expected, rank, 2))
            for got, want in zip(torch.autograd.grad(out.sum(), own), wanted, strict=True):
                close(f"gradient, heads {q_heads} {kv_heads}", got, shards.take(want, rank, 2))
    for q_heads, kv_heads, ranks in itertools.product((1, 3, 8, 12), (1, 3, 4), (1, 2, 5, 16)):
        if q_heads % kv_heads == 0:
            shares = share_heads(q_heads, kv_heads, ranks)
            assert [h for s in shares for h in range(*s.q)] == list(range(q_heads))


def repeats(group: Any) -> None:
    """The same bits in every call, and what a call leaves does not change the next."""
    for kind in ("ulysses", "ring", "usp"):
        _, own, mask, _ = parts(group, dtype=torch.bfloat16)
        results = []
        for _ in range(2):
            inputs = [x.clone().requires_grad_() for x in own]
            out, lse = sequence_parallel_attention(
                *inputs, mask, group=group_of(group, kind), kind=kind, return_lse=True,
                deterministic=True,
            )  # fmt: skip
            grads = torch.autograd.grad(out.sum() + lse.clamp(min=-9).sum(), inputs)
            results.append([out, lse, *grads])
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)


def half_precision(group: Any) -> None:
    """bf16 parts that are merged are as near to the truth as bf16 in one piece, twice over."""
    rank = dist.get_rank(group)
    whole, own, mask, shards = parts(group, dtype=torch.bfloat16)
    exact = attention(*(x.double() for x in whole), mask)
    single = shards.take(attention(*whole, mask).double() - exact, rank, 2)
    for kind in ("ulysses", "ring"):
        out = sequence_parallel_attention(*own, mask, group=group, kind=kind)
        assert out.dtype == torch.bfloat16
        error = (out.double() - shards.take(exact, rank, 2)).square().mean().sqrt()
        assert error <= 2 * single.square().mean().sqrt()


def quantized(group: Any) -> None:
    """Quantized forward passes; their gradients are refused on all ranks."""
    rank = dist.get_rank(group)
    whole, own, mask, shards = parts(group, dtype=torch.bfloat16)
    expected = shards.take(attention(*whole, mask).float(), rank, 2)
    for kind in ("ulysses", "ring"):
        out = sequence_parallel_attention(*own, mask, group=group, kind=kind, precision="sage_fp16")
        error = float((out.float() - expected).norm() / expected.norm())
        assert error < 0.05, f"{kind}: {error}"
    try:
        own[0].requires_grad_()
        sequence_parallel_attention(*own, mask, group=group, precision="sage_fp16")
    except ValueError as error:
        assert "has no backward pass" in str(error)
    else:
        raise AssertionError("a quantized call with a gradient was not refused")


def backends(group: Any) -> None:
    """``backend=`` and ``use_backend`` reach forward and backward of every step."""
    _, own, mask, _ = parts(group, dtype=torch.float64)
    own = [x.requires_grad_() for x in own]
    for kind in ("ulysses", "ring"):
        with use_backend("reference"):
            out = sequence_parallel_attention(*own, mask, group=group, kind=kind)
        out.sum().backward()
        try:  # no kernel in C++ takes fp64: nothing falls back in silence
            sequence_parallel_attention(*own, mask, group=group, kind=kind, backend="cpu")
        except RuntimeError as error:
            assert "float64" in str(error)
        else:
            raise AssertionError("backend='cpu' served fp64")


def compiled(group: Any) -> None:
    """torch.compile leaves the call as it is, between its graphs."""
    _, own, mask, _ = parts(group)

    def layer(q: Any, k: Any, v: Any) -> Any:
        return sequence_parallel_attention(q * 1.0, k, v, mask, group=group, kind="ring") + 1

    torch._dynamo.reset()
    close("out", torch.compile(layer, backend="eager")(*own), layer(*own))


def unchecked(group: Any) -> None:
    """check=False: no comparison; dense sizes must then be said."""
    whole, own, mask, shards = parts(group)
    out = sequence_parallel_attention(*own, mask, group=group, check=False)
    close("out", out, shards.take(attention(*whole, mask), dist.get_rank(group), 2))
    sequence_parallel_attention(*own, group=group, check=False, shards=shards)
    try:
        sequence_parallel_attention(*own, group=group, check=False)
    except ValueError as error:
        assert "shards must be given" in str(error)
    else:
        raise AssertionError("sizes that nobody knows were guessed")


def refusals(group: Any) -> list[str]:
    """What one rank finds by itself, in the order of ``test_options.REFUSALS``."""
    _, own, mask, shards = parts(group)
    messages = []
    for arguments, options in (
        ((mask,), {"kind": "spiral"}),
        ((mask,), {"kind": "usp"}),
        ((mask,), {"head_chunks": 0}),
        (("window",), {}),
        ((mask,), {"is_causal": True}),
        ((mask,), {"gate": 1.0}),
        ((mask,), {"tile_order": True}),
        ((mask,), {"shards": Shards.even(96, 3)}),
        ((mask,), {"shards": Shards.even(90, shards.num_ranks)}),
        ((mask,), {"layout": "sbhd"}),
        ((mask,), {"timeout": 0}),
        ((mask,), {"backend": "abacus"}),
    ):
        try:
            sequence_parallel_attention(*own, *arguments, **({"group": group} | options))
            messages.append("none")
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages
