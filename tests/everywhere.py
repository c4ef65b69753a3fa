"""One small problem and a few more, on reference, cpu and Triton (on a GPU where there is one)."""

from __future__ import annotations

import oracle
import pytest
import torch
from machine import HAS_GPU
from problems import Built, Problem, random_problems, require_backend
from torch import Tensor

CPU = torch.device("cpu")
ON_CPU = [("reference", CPU), ("cpu", CPU)]
if not HAS_GPU:  # with one, Triton kernels do not take CPU tensors
    ON_CPU.append(("triton", CPU))
BACKENDS = [pytest.param(*b, id=b[0]) for b in ON_CPU]
BACKENDS.append(
    pytest.param("triton", torch.device("cuda"), id="triton-gpu", marks=pytest.mark.gpu)
)
everywhere = pytest.mark.parametrize(("backend", "device"), BACKENDS)

SMALL = Problem(
    index=0, seed=11, kind="lists", dtype=torch.float32, batch=2, kv_heads=1, group=2, head_dim=40,
    head_dim_v=24, memory="bhsd", logits="normal", with_lse_grad=True, q_len=25, kv_len=58,
    q_block_size=16, kv_block_size=32, lens="per-batch", mask_heads=True, density=0.6,
)  # fmt: skip
FEW = random_problems(8, seed=77, dtypes=(torch.float16, torch.float32), max_len=80, max_heads=2)


def build(problem: Problem, backend: str, device: torch.device) -> Built:
    require_backend(backend)
    return problem.build(device)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def assert_same_bits(first: oracle.Result, second: oracle.Result, label: str) -> None:
    for name, a, b in zip(oracle.Result._fields, first, second, strict=True):
        different = int((bits(a) != bits(b)).sum())
        assert different == 0, f"{label} {name}: {different} bytes differ of {bits(a).numel()}"
