"""sequence_parallel_attention(q, k, v, mask): attention over a sequence that many ranks share."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..attention import as_bhsd
from ..block_mask import BlockMask
from ..functional.patterns import Pattern
from ..functional.video_tokens import VideoTokens
from ..functional.vsa import Gate
from ..quantize import QuantizationOptions
from .agreement import DEFAULT_TIMEOUT
from .dtensor import attention_of_dtensors
from .request import Agreement, Group, Request, known_shards, prepare, teams_of
from .run import run
from .shards import Shards


@overload
def sequence_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Pattern | None = ..., *,
    group: Group = ..., kind: str = ..., tokens: VideoTokens | None = ...,
    tile_order: bool = ..., gate: Gate = ..., shards: Shards | None = ...,
    kv_shards: Shards | None = ..., layout: str = ...,
    scale: float | None = ..., precision: str = ..., is_causal: bool = ...,
    return_lse: Literal[False] = ..., backend: str | None = ..., deterministic: bool = ...,
    quantization: QuantizationOptions | None = ..., head_chunks: int | None = ...,
    check: bool = ..., timeout: float = ...,
) -> Tensor: ...  # fmt: skip
@overload
def sequence_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Pattern | None = ..., *,
    group: Group = ..., kind: str = ..., tokens: VideoTokens | None = ...,
    tile_order: bool = ..., gate: Gate = ..., shards: Shards | None = ...,
    kv_shards: Shards | None = ..., layout: str = ...,
    scale: float | None = ..., precision: str = ..., is_causal: bool = ...,
    return_lse: Literal[True], backend: str | None = ..., deterministic: bool = ...,
    quantization: QuantizationOptions | None = ..., head_chunks: int | None = ...,
    check: bool = ..., timeout: float = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Pattern | None = None,
    *,
    group: Group = None,
    kind: str = "ulysses",
    tokens: VideoTokens | None = None,
    tile_order: bool = False,
    gate: Gate = None,
    shards: Shards | None = None,
    kv_shards: Shards | None = None,
    layout: str = "bhsd",
    scale: float | None = None,
    precision: str = "native",
    is_causal: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    deterministic: bool = False,
    quantization: QuantizationOptions | None = None,
    head_chunks: int | None = None,
    check: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`video_attn.attention` over a sequence whose tokens are spread over many ranks.

    A collective: every rank of the group calls it with its part of q, k, v and the same of all
    else. Differentiable; the gradients of the copies of a token that several ranks hold add up to
    the gradient of the token. ``torch.compile`` leaves it outside of its graphs.

    Args:
        q: [B, Hq, this rank's tokens, D]. k: [B, Hkv, ..., D]. v: [B, Hkv, ..., Dv]. Heads and
            tokens need not be divisible by the number of ranks. DTensors sharded over the sequence
            or over the heads are taken too, and give one back.
        mask: a block mask over the whole sequence, or a pattern (``SlidingTile``, ``VideoSparse``,
            ``Radial``, ``Dense``), the same on all ranks; None for dense attention.
        group: the ranks: a process group, a one-dimensional DeviceMesh, or None for all. For "usp"
            a two-dimensional DeviceMesh (ring, Ulysses): the ranks of a row trade heads, those of a
            column pass keys on, and parts are held in the order of the flattened mesh.
        kind: "ulysses": ranks trade tokens for heads, and each attends to whole sequences of its
            heads. "ring": queries stay; with a mask each rank gathers the keys that its queries
            list, without one the keys of all ranks come by, one rank after another.
            "usp": Ulysses inside of rows, ring between them.
        tokens: for a pattern, how the tokens of the whole sequence lie.
        tile_order: the sequence that the ranks share is in the (packed) tile order of the pattern,
            as :meth:`VideoLayout.tile_order` has it, text last; default: in raster order. A ring
            then finds most blocks where their tokens are.
        gate: for ``VideoSparse`` with gate "auto", the weight of the coarse branch: a number, or a
            tensor that broadcasts to this rank's output; None: no coarse branch.
        shards: which tokens each rank holds; default: rank r of n holds those from S*r//n up to
            S*(r+1)//n. See :class:`Shards` for other lengths, stripes, and text that all hold.
        kv_shards: the same for k and v; default ``shards``, and for a mask with another number of
            keys the default rule.
        layout: "bhsd", or "bshd" for q, k, v, gate and output [B, S, H, D].
        return_lse: also return the log-sum-exp of this rank's queries, fp32 [B, Hq, S].
        scale, precision, is_causal, backend, deterministic, quantization: as in
            :func:`video_attn.attention`. A ring takes ``is_causal`` with contiguous shards only.
        head_chunks: into how many parts the heads of a rank are cut, to attend to one while the
            next travels; default by their size. A dense ring has steps instead.
        check: compare the sizes and options of all ranks (one small message over the CPU): before
            anything large moves, or, where a GPU repeats a call that all agreed on, beside it.
            False leaves it out, for CUDA graphs: then ranks that differ may hang.
        timeout: seconds that ranks wait for one another in that comparison.

    Returns:
        out [B, Hq, this rank's tokens, Dv] (or as ``layout`` says) in the dtype of q; with
        ``return_lse``, (out, lse).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value on this rank, or one that
            differs between ranks: then on all of them.
        PeerError: another rank failed its checks, died, or did not come within ``timeout``.
        RuntimeError: torch.distributed is not initialized; no backend can serve.
    """
    request = Request(
        mask, tokens, tile_order, gate, shards, kv_shards, scale, precision, is_causal,
        return_lse, backend, deterministic, quantization, head_chunks,
    )  # fmt: skip
    if any(isinstance(x, DTensor) for x in (q, k, v)):
        return attention_of_dtensors(_attend, request, group, kind, layout, check, timeout, q, k, v)
    return _attend(request, group, kind, layout, check, timeout, q, k, v)


@torch._disable_dynamo
def _attend(
    request: Request, group: Group, kind: str, layout: str, check: bool, timeout: float, *qkv: Any
) -> Tensor | tuple[Tensor, Tensor]:
    teams = teams_of(group, kind)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"timeout must be a number of seconds > 0, got {timeout!r}")
    call, agreement, error = None, None, None
    try:
        q, k, v = as_bhsd(layout, **dict(zip("qkv", qkv, strict=True)))
        call = prepare(teams, _as_bhsd(request, layout), q, k, v)
    except (TypeError, ValueError) as wrong:
        error = wrong
    if check:
        agreement = Agreement(teams, call, error, timeout)
    elif error is not None:
        raise error
    assert call is not None
    out, lse = run(call, *known_shards(call, None if agreement is None else agreement.held))
    if agreement is not None:
        agreement.finish()
    out = out.transpose(1, 2) if layout == "bshd" else out
    return out if lse is None else (out, lse)


def _as_bhsd(request: Request, layout: str) -> Request:
    """The request with its gate in the order of q [B, H, S, D]."""
    gate = request.gate
    if layout == "bhsd" or not isinstance(gate, Tensor) or gate.dim() < 3:
        return request
    gate = gate if gate.dim() == 4 else gate[None]
    return dataclasses.replace(request, gate=gate.transpose(1, 2))
