"""attention() on random problems, on every backend, against the fp64 oracle, with all gradients.

The lists are long on purpose: 300 problems on `cpu`, 84 on the Triton interpreter, and on a GPU the
300 again. A backend that is missing where it should be makes these tests fail, not skip.
"""

from __future__ import annotations

import pytest
import torch
from machine import HAS_GPU
from oracle import check_against_oracle
from problems import Problem, random_problems, require_backend, run_attention

from video_attn.calls import problem_of
from video_attn.registry import backends, select

CPU_PROBLEMS = random_problems(
    300, seed=20261120, dtypes=(torch.float32, torch.bfloat16, torch.float16)
)
# The interpreter runs program by program in numpy: short sequences. Its bf16 arithmetic is wrong.
INTERPRETER_PROBLEMS = random_problems(
    84, seed=20261121, dtypes=(torch.float16, torch.float32), max_len=110, max_heads=2
)
REFERENCE_PROBLEMS = random_problems(
    36, seed=20261122, dtypes=(torch.float64, torch.float32, torch.bfloat16), max_len=300
)
GPU_PROBLEMS = [
    *random_problems(300, seed=20261120, dtypes=(torch.bfloat16, torch.float16), max_len=1100),
    *random_problems(60, seed=20261128, dtypes=(torch.float32,), max_len=1100),
]

compiled_kernels = pytest.mark.skipif(
    HAS_GPU, reason="on a machine with a GPU the Triton kernels are compiled: see the gpu tests"
)


def check(problem: Problem, backend: str, device: torch.device | str = "cpu") -> None:
    built = problem.build(device)
    check_against_oracle(run_attention(built, backend), built, f"{backend}: {problem}")


@pytest.mark.parametrize("problem", REFERENCE_PROBLEMS, ids=str)
def test_reference(problem: Problem):
    check(problem, "reference")


@pytest.mark.parametrize("problem", CPU_PROBLEMS, ids=str)
def test_cpu(problem: Problem):
    require_backend("cpu")
    check(problem, "cpu")


@compiled_kernels
@pytest.mark.parametrize("problem", INTERPRETER_PROBLEMS, ids=str)
def test_triton_interpreter(problem: Problem):
    require_backend("triton")
    check(problem, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("problem", GPU_PROBLEMS, ids=str)
def test_gpu(problem: Problem, gpu: torch.device):
    """Every backend that says it can serve the problem; the skip is the refusal of all of them."""
    require_backend("triton")
    built = problem.build(gpu)
    served, refusals = [], []
    for backend in backends():
        reason = refusal_of(backend, built)
        if reason is None and backend.name != "reference":
            check_against_oracle(run_attention(built, backend.name), built, backend.name)
            served.append(backend.name)
        refusals.append(f"{backend.name}: {reason}")
    if not served:
        pytest.skip("; ".join(refusals))


def refusal_of(backend, built) -> str | None:
    q, k, v = built.kernel_inputs
    if built.kernel_options.get("layout") == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_causal = built.kernel_options["is_causal"]
    for direction in ("forward", "backward"):
        problem = problem_of(direction, q, k, v, built.mask, is_causal=is_causal)
        reason = backend.refusal(problem)
        if reason is not None:
            return reason
    return None


@pytest.mark.gpu
def test_gpu_list_is_hardly_skipped(gpu: torch.device):
    """On a supported GPU no problem of the list goes unserved: a skip there would hide a hole."""
    unserved = []
    for problem in GPU_PROBLEMS:
        built = problem.build(gpu)
        if all(refusal_of(b, built) for b in backends() if b.name != "reference"):
            unserved.append(str(problem))
    assert not unserved


def test_automatic_choice_on_this_machine():
    """Without a GPU the C++ backend runs; the slow reference is never the silent choice."""
    built = CPU_PROBLEMS[0].build()
    q, k, v = built.kernel_inputs
    chosen = select(problem_of("forward", q, k, v, built.mask)).name
    assert chosen == "cpu"
