"""Video sparse attention by its definition, in the tile numbers of tokens; and how to compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import oracle
import token_masks
import torch
from torch import Tensor


@dataclass
class Tokens:
    """The tile number of every query and key token; ``TEXT`` for valid text, ``NONE`` for padding.

    One list serves all batch items, or there is one per batch item.
    """

    q: Sequence[Sequence[int]]
    kv: Sequence[Sequence[int]]
    q_tiles: int
    kv_tiles: int


TEXT, NONE = -2, -1


def tile_numbers(grid: token_masks.Triple, tile: token_masks.Triple) -> list[int]:
    """The tile of every token in raster order, tiles counted in raster order."""
    tiles = sorted({_tile_of(c, tile) for c in token_masks.raster_coordinates(grid)})
    return [tiles.index(_tile_of(c, tile)) for c in token_masks.raster_coordinates(grid)]


def _tile_of(token: token_masks.Triple, tile: token_masks.Triple) -> token_masks.Triple:
    return token[0] // tile[0], token[1] // tile[1], token[2] // tile[2]


def means(x: Tensor, numbers: Sequence[Sequence[int]], tiles: int) -> Tensor:
    """[B, H, tiles, D]: the mean over the tokens of each tile, 0 for a tile without tokens."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    member = torch.tensor(numbers, device=x.device)[:, None, :] == torch.arange(
        tiles, device=x.device
    ).view(1, -1, 1)
    weights = member.to(wide) / member.sum(-1, keepdim=True).clamp_min(1)
    return (weights[:, None] @ x.to(wide)).to(x.dtype)


def tile_scores(q: Tensor, k: Tensor, tokens: Tokens) -> Tensor:
    """[B, Hq, q_tiles, kv_tiles], -inf for a key tile without tokens."""
    group = q.shape[1] // k.shape[1]
    q_mean = means(q, tokens.q, tokens.q_tiles)
    k_mean = means(k, tokens.kv, tokens.kv_tiles).repeat_interleave(group, 1)
    scores = (q_mean / math.sqrt(q.shape[-1])) @ k_mean.transpose(-1, -2)
    numbers = torch.tensor(tokens.kv, device=q.device)
    empty = torch.stack([(numbers != i).all(-1) for i in range(tokens.kv_tiles)], -1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return scores.to(wide).masked_fill(empty[:, None, None, :], -torch.inf)


def token_mask(tokens: Tokens, selected: Tensor) -> Tensor:
    """bool [B, Hq, Sq, Sk] of the sparse branch; ``selected`` bool [B, Hq, q_tiles, kv_tiles]."""
    masks = []
    for b, tiles in enumerate(selected):
        q_at, kv_at = (
            torch.tensor(x[b % len(x)], device=tiles.device) for x in (tokens.q, tokens.kv)
        )
        both_video = (q_at >= 0)[:, None] & (kv_at >= 0)
        any_text = (q_at == TEXT)[:, None] | (kv_at == TEXT)
        valid = (q_at != NONE)[:, None] & (kv_at != NONE)
        picked = tiles[:, q_at.clamp_min(0)][..., kv_at.clamp_min(0)]
        masks.append(valid & (any_text | (both_video & picked)))
    return torch.stack(masks)


def definition(q, k, v, tokens: Tokens, selected: Tensor, gate, attend) -> Tensor:
    """sparse + gate * coarse in the dtype of q; ``attend`` is the oracle's exact or plain form."""
    out, _ = attend(q, k, v, token_mask(tokens, selected))
    group = q.shape[1] // k.shape[1]
    weights = tile_scores(q, k, tokens).softmax(-1).nan_to_num()
    v_mean = means(v, tokens.kv, tokens.kv_tiles).repeat_interleave(group, 1)
    coarse = weights.to(q.dtype) @ v_mean
    numbers = torch.tensor(tokens.q, device=q.device).expand(q.shape[0], -1)
    at = numbers.clamp_min(0)[:, None, :, None].expand(-1, q.shape[1], -1, v.shape[-1])
    coarse = coarse.gather(2, at).masked_fill((numbers < 0)[:, None, :, None], 0)
    return out + coarse * (1 if gate is None else gate)


def check(function, qkv, gate, grad, tokens: Tokens, top_k: int, masks: list, poison=None):
    """Compares ``function(q, k, v, gate)`` and its gradients with the definition, by the 2x rule.

    The function gets its inputs through ``poison(name, tensor)``, the definition gets them clean.
    """

    def run(f, dtype, prepare):
        inputs = dict(zip("qkv", qkv, strict=True))
        if isinstance(gate, Tensor):
            inputs["gate"] = gate
        leaves = {
            name: prepare(name, x.to(dtype)).detach().clone().requires_grad_()
            for name, x in inputs.items()
        }
        out = f(leaves["q"], leaves["k"], leaves["v"], leaves.get("gate", gate))
        grads = torch.autograd.grad(out, list(leaves.values()), prepare("grad", grad.to(dtype)))
        return [out.detach(), *grads]

    def defined(attend):
        return lambda q, k, v, gate: definition(q, k, v, tokens, selected, gate, attend)

    def clean(name, x):
        return x

    masks.clear()
    dtype = qkv[0].dtype
    got = run(function, dtype, poison or clean)
    selected = masks[-1].to_dense()[:, :, : tokens.q_tiles, : tokens.kv_tiles]
    selected = selected.expand(qkv[0].shape[0], qkv[0].shape[1], -1, -1)
    check_selection(selected, tile_scores(*(x.double() for x in qkv[:2]), tokens), top_k, dtype)
    exact = run(defined(oracle.attention_oracle), torch.float64, clean)
    plain = run(defined(oracle.attention_plain), dtype, clean)
    wide = [x.double() for x in qkv]
    lse = oracle.attention_oracle(*wide, token_mask(tokens, selected))[1]
    for name, *tensors in zip(("out", "dq", "dk", "dv"), got, exact, plain, strict=False):
        oracle.check_close(name, *tensors, lse=lse)
    if isinstance(gate, Tensor) and gate.shape == grad.shape:
        oracle.check_close("dgate", got[4], exact[4], plain[4], lse=lse)
    elif isinstance(gate, Tensor):
        coarse = definition(*wide, tokens, selected, 1, oracle.attention_oracle)
        coarse = coarse - definition(*wide, tokens, selected, 0, oracle.attention_oracle)
        check_summed(got[4], exact[4], coarse * grad)
    return got


def check_summed(got: Tensor, exact: Tensor, summands: Tensor) -> None:
    """A gradient summed over most dimensions: its error is a walk of the summands' roundings.

    The 2x rule is for many values; of two or three, torch's own error is small by luck.
    """
    walk = summands.square().sum_to_size(exact.shape).sqrt() * torch.finfo(got.dtype).eps
    assert ((got - exact).abs() <= 3 * (walk + exact.abs() * torch.finfo(got.dtype).eps)).all(), (
        f"dgate: got {got.tolist()}, exact {exact.tolist()}"
    )


def check_selection(selected: Tensor, scores: Tensor, top_k: int, dtype: torch.dtype) -> None:
    """Exactly ``top_k`` tiles per row, and none left out that is better by more than rounding."""
    assert (selected.sum(-1) == top_k).all(), "each row must keep exactly top_k tiles"
    worst_kept = scores.masked_fill(~selected, torch.inf).amin(-1)
    best_left = scores.masked_fill(selected, -torch.inf).amax(-1)
    size = scores.masked_fill(scores.isinf(), 0).abs().amax()
    slack = 4 * torch.finfo(dtype).eps * size
    assert (worst_kept >= best_left - slack).all(), "a better tile was left out"
