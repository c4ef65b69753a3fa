"""The random problems that the Hopper kernels run on a GPU."""

from __future__ import annotations

import torch
from problems import Problem, random_problems

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
