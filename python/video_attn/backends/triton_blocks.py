"""Block means and exact top-k by Triton kernels; a part of backend ``triton``."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from ..calls import BlockOps, RankCall, Ranking, Side
from ..kernels.launch import Launch, run_launches, temporary
from ..kernels.launch_tables import unsupported_arch
from ..kernels.plans import run_planned


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


def _rank(call: RankCall) -> Ranking:
    """Three launches from one plan: means, scores with the coarse part, top-k."""
    q, k, v, q_side, kv_side = call.q, call.k, call.v, call.q_side, call.kv_side
    (batch, heads, _, dim), kv_heads = q.shape, k.shape[1]
    rows, keys = q_side.tiles(q_side.slot), kv_side.tiles(kv_side.slot)
    empty = partial(torch.empty, device=q.device)
    q_mean = empty((batch, heads, rows, dim), dtype=q.dtype)
    k_mean = empty((batch, kv_heads, keys, dim), dtype=q.dtype)
    v_mean = coarse = None
    if v is not None:
        v_mean = empty((batch, kv_heads, keys, v.shape[3]), dtype=q.dtype)
        coarse = empty((batch, heads, rows, v.shape[3]), dtype=q.dtype)
    selected = empty((batch, heads, rows, call.top_k), dtype=torch.int32)
    counts = empty((batch, heads, rows), dtype=torch.int32)
    ranking = Ranking(selected, counts, coarse, (q_mean, k_mean, v_mean))
    tensors = {
        "q": q, "k": k, "v": v, "q_mean": q_mean, "k_mean": k_mean, "v_mean": v_mean,
        "q_lens": q_side.lens, "kv_lens": kv_side.lens,
        "selected": selected, "counts": counts, "coarse": coarse,
    }  # fmt: skip
    options = ("rank", q_side.slot, kv_side.slot, call.top_k, call.scale, call.score_dtype)
    run_planned(options, tensors, partial(_rank_launches, call, ranking))
    return ranking


def _rank_launches(call: RankCall, ranking: Ranking) -> list[Launch]:
    from ..kernels import block_pool, block_rank

    selected, counts, coarse, means = ranking
    lens = call.kv_side.lens
    scores = temporary(
        *selected.shape[:3], means[1].shape[2],
        dtype=call.score_dtype or torch.float32, device=selected.device,
    )  # fmt: skip
    return [
        block_rank.block_means((call.q, call.k, call.v), means, call.q_side, call.kv_side),
        block_rank.block_scores(means, scores, coarse, lens, call.scale),
        block_pool.select_top_k(scores, selected, call.top_k, lens, counts),
    ]


def _add_coarse(out: Tensor, coarse: Tensor, gate: Tensor | float, side: Side) -> None:
    weight = gate if isinstance(gate, Tensor) else None
    tensors = {"out": out, "coarse": coarse, "gate": weight, "lens": side.lens}
    options = ("add_coarse", side.slot, side.length, None if weight is not None else gate)
    run_planned(options, tensors, partial(_add_coarse_launches, out, coarse, gate, side))


def _add_coarse_launches(
    out: Tensor, coarse: Tensor, gate: Tensor | float, side: Side
) -> list[Launch]:
    from ..kernels import block_rank

    return [block_rank.add_coarse(out, coarse, gate, side)]


BLOCK_OPS = BlockOps(_refusal, _block_mean, _block_mean_backward, _select_top_k, _rank, _add_coarse)
