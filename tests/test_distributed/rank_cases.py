"""What the ranks of the pool run: each makes the whole problem, attends to its part, compares."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import problems
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from video_attn.distributed import (
    Shards,
    balanced_shards,
    record_traffic,
    sequence_parallel_attention,
    striped_shards,
)

Group = dist.ProcessGroup
GRADS = ("dq", "dk", "dv")


def group_of(group: Group, kind: str) -> Any:
    """The group for a kind: a two-dimensional mesh of all ranks for "usp"."""
    return _mesh() if kind == "usp" else group


@cache
def _mesh() -> DeviceMesh:
    return DeviceMesh("cpu", [[0, 1], [2, 3]])


def random_shards(length: int, ranks: int, rng: random.Random) -> Shards:
    """Contiguous, of any lengths, 0 among them."""
    cuts = sorted(rng.randint(0, length) for _ in range(ranks - 1))
    return Shards(tuple(((a, b),) for a, b in zip([0, *cuts], [*cuts, length], strict=True)))


def scattered_shards(length: int, ranks: int, rng: random.Random) -> Shards:
    """Pieces of any lengths dealt to ranks at random, some to two of them."""
    cuts = sorted({0, length, *(rng.randint(0, length) for _ in range(3 * ranks))})
    own: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for piece in itertools.pairwise(cuts):
        for rank in rng.sample(range(ranks), rng.choice((1, 1, 1, 2))):
            own[rank].append(piece)
    for pieces in own:
        rng.shuffle(pieces)
    return Shards(tuple(tuple(pieces) for pieces in own))


def shards_for(how: str, built: problems.Built, length: int, ranks: int, seed: int) -> Shards:
    rng = random.Random(f"{how} {length} {ranks} {seed}")
    mask = built.mask
    square = mask is not None and mask.q_len == mask.kv_len
    square = square and mask.q_block_size == mask.kv_block_size
    makers: dict[str, Callable[[], Shards]] = {
        "even": lambda: Shards.even(length, ranks),
        "random": lambda: random_shards(length, ranks, rng),
        "scattered": lambda: scattered_shards(length, ranks, rng),
        "balanced": lambda: balanced_shards(mask, ranks),
        "striped": lambda: striped_shards(mask, ranks, rng.choice((1, 2))),
    }
    return makers[how if square or how not in ("balanced", "striped") else "random"]()


def random_problem(group: Any, problem: problems.Problem, kind: str, how: str) -> int:
    """A problem of the generator, against one process; returns the bytes sent."""
    built = problem.build()
    ranks = dist.get_world_size(group)
    causal_ring = problem.kind == "causal" and kind != "ulysses"
    if causal_ring and problem.q_len != problem.kv_len:
        kind, causal_ring = "ulysses", False  # a causal ring has as many keys as queries
    how = "random" if causal_ring else how
    shards = shards_for(how, built, problem.q_len, ranks, problem.seed)
    kv_shards = shards_for(how, built, problem.kv_len, ranks, problem.seed)
    with record_traffic() as traffic:
        compare(group, kind, built, shards, kv_shards)
    return traffic.total


def compare(
    group: Any, kind: str, built: problems.Built, shards: Shards, kv_shards: Shards
) -> None:
    """out, lse and gradients of this rank's part equal those of one process, to rounding."""
    problem, options = built.problem, dict(built.kernel_options)
    rank = dist.get_rank(group)
    whole = problems.run_attention(built)
    dim = 1 if options.get("layout") == "bshd" else 2
    places = (shards, kv_shards, kv_shards)
    q, k, v = (
        s.take(x, rank, dim).detach().requires_grad_()
        for s, x in zip(places, built.kernel_inputs, strict=True)
    )
    out, lse = sequence_parallel_attention(
        q, k, v, built.mask, group=group_of(group, kind), kind=kind, shards=shards,
        kv_shards=kv_shards, return_lse=True, head_chunks=(None, 2, 3)[problem.index % 3],
        **options,
    )  # fmt: skip
    grad_out, grad_lse = shared(built, shards)
    outputs = [out, lse] if problem.with_lse_grad else [out]
    grads = [shards.take(grad_out, rank, dim), shards.take(grad_lse, rank, 2)][: len(outputs)]
    dq, dk, dv = torch.autograd.grad(outputs, (q, k, v), grads)
    if dim == 1:
        out, dq, dk, dv = (x.transpose(1, 2) for x in (out, dq, dk, dv))
    close("out", out, shards.take(whole.out, rank, 2))
    close("lse", lse, shards.take(whole.lse, rank, 2))
    for name, got, place in zip(GRADS, (dq, dk, dv), places, strict=True):
        total = sum_of_copies(got, place, rank, group)
        close(name, total, place.take(getattr(whole, name), rank, 2))


def shared(built: problems.Built, shards: Shards) -> tuple[Tensor, Tensor]:
    """Output gradients such that those of all copies of a token add up to the whole ones."""
    grad_out, grad_lse = built.kernel_grads
    count = torch.zeros(shards.length, dtype=grad_out.dtype)
    for rank in range(shards.num_ranks):
        count[shards.positions(rank)] += 1
    dim = 1 if built.kernel_options.get("layout") == "bshd" else 2
    view = [1] * 4
    view[dim] = -1
    return grad_out / count.view(view), grad_lse / count


def sum_of_copies(grad: Tensor, shards: Shards, rank: int, group: Any) -> Tensor:
    """The gradient [B, H, held, D] of this rank's tokens summed over all ranks that hold them."""
    whole = grad.new_zeros(*grad.shape[:2], shards.length, grad.shape[3])
    whole[:, :, shards.positions(rank)] = grad.detach()
    dist.all_reduce(whole, group=group)
    return whole[:, :, shards.positions(rank)]


def close(name: str, got: Tensor, expected: Tensor) -> None:
    """To rounding: the sums of one process in another order."""
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, not {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, not {expected.dtype}"
    infinite = expected.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinite elsewhere"
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} NaN"
    if got.numel() == 0:
        return
    bound = 1e-12 if expected.dtype == torch.float64 else 1e-5
    got, expected = (x.masked_fill(infinite, 0).double() for x in (got, expected))
    error, size = float((got - expected).abs().max()), float(expected.abs().max())
    assert error <= bound * (1 + size), f"{name}: off by {error:.3e}, largest value {size:.3g}"
