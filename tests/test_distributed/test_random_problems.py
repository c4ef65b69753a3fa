"""Random problems on several ranks equal one process, forward and backward."""

from __future__ import annotations

import problems
import pytest
import torch
from rank_pool import PAIR, RANKS, RankPool

HOW = ("even", "random", "scattered", "balanced", "striped")
PROBLEMS = problems.random_problems(
    72, seed=20261127, dtypes=(torch.float64, torch.float64, torch.float32), max_len=150,
    max_heads=6, head_dims=((16, 16), (8, 8), (24, 40), (32, 32), (40, 8)),
)  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_like_one_process(ranks: RankPool, problem: problems.Problem) -> None:
    size = (len(PAIR), RANKS)[(problem.index // 2) % 2]
    how = HOW[problem.index % len(HOW)]
    for kind in ("ulysses", "ring"):
        ranks.run(size, "rank_cases:random_problem", problem, kind, how)
    if problem.index % 3 == 0:
        ranks.run(RANKS, "rank_cases:random_problem", problem, "usp", how)
