"""Problems that the Hopper kernels run on a GPU: random ones, and scores that leap."""

from __future__ import annotations

import torch
from problems import Problem, random_problems
from torch import Tensor

from video_attn import BlockMask
from video_attn.backends import hopper
from video_attn.registry import Problem as RegistryProblem


def served(problem: Problem) -> bool:
    """Whether the backend says yes to it on an H100."""
    sizes: list[int | None] = [None, None]
    if problem.kind not in ("dense", "causal"):
        sizes = [problem.q_block_size, problem.kv_block_size]
    question = RegistryProblem(
        "forward", "cuda", "sm_90", problem.dtype, problem.head_dim, problem.head_dim_v, *sizes,
        is_causal=problem.kind == "causal",
    )  # fmt: skip
    return hopper._supports(question) is None


PROBLEMS = [
    problem
    for problem in random_problems(
        900, seed=20261124, dtypes=(torch.bfloat16, torch.float16), max_len=1100,
        head_dims=((64, 64), (128, 128), (8, 8), (40, 40), (72, 72), (96, 96)),
    )
    if served(problem)
]  # fmt: skip

LEVELS = (0, 3, 20, 25, 300, 299, 310, 10, 2000, 1990, 2001)
LEAPING_SCALE = 0.1


class LeapingScores:
    """Scores that lie near one of ``LEVELS`` in each 128 keys, for lists of ``block`` or dense.

    The kernels make weights by the maximum of the steps before: too large ones and infinite ones.
    """

    def __init__(self, head_dim: int, block: int | None, dtype: torch.dtype) -> None:
        rows, tokens = 200, 128 * len(LEVELS)
        make = torch.Generator().manual_seed(head_dim)
        q, noise, v = (
            torch.randn(1, 1, n, head_dim, generator=make) for n in (rows, tokens, tokens)
        )
        direction = torch.randn(head_dim, generator=make)
        level = torch.tensor(LEVELS).repeat_interleave(128) / direction.square().sum()
        self.q = (direction + 0.05 * q).to(dtype)
        self.k = (level[:, None] / LEAPING_SCALE * direction + noise).to(dtype)
        self.v, self.mask = v.to(dtype), None
        seen = torch.ones(rows, tokens, dtype=torch.bool)
        if block is not None:
            lists = -(-rows // block)
            keep = torch.rand(1, 1, lists, tokens // block, generator=make) < 0.7
            keep[..., :2, 0] = keep[..., :2, -1] = True
            self.mask = BlockMask.from_dense(keep, block, block, q_len=rows, kv_len=tokens)
            seen = keep[0, 0].repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)
        scores = self.q.double() @ self.k.double().mT * LEAPING_SCALE
        self.scores = scores.masked_fill(~seen, -torch.inf)

    def check(self, out: Tensor, lse: Tensor) -> None:
        expected = self.scores.softmax(-1) @ self.v.double()
        logarithms = self.scores.logsumexp(-1)
        torch.testing.assert_close(lse.double().cpu(), logarithms, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(out.double().cpu(), expected, atol=2e-2, rtol=2e-2)
