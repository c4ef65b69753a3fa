"""Runs a problem on a backend, and compares with the reference in fp32."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention import attention
from ...registry import Backend, backends
from ..bench.check import relative_error
from .problems import Built, CheckProblem

# Relative error (Euclidean norms) against exact attention on the same inputs: some roundings of
# each dtype, and for codes what their definition costs (docs/sage_notes.md) and a tenth.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
ALLOWED_CODES = {"sage_fp16": 0.025, "sage_fp8": 0.058, "fp8": 0.075}
ALLOWED_LSE = {"native": 2e-3, "sage_fp16": 0.05, "sage_fp8": 0.05, "fp8": 0.15}  # absolute


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        part: the result that is furthest off, of out, lse, dq, dk, dv.
        failure: what went wrong instead of a comparison.
    """

    problem: str
    backend: str
    direction: str
    part: str = ""
    error: float = 0.0
    allowed: float = 0.0
    seconds: float = 0.0
    failure: str = ""

    @property
    def right(self) -> bool:
        return not self.failure and self.error <= self.allowed


def checked_backends() -> list[Backend]:
    """All that can run on this machine, but for the reference."""
    return [b for b in backends() if b.name != "reference" and b.available() is None]


def rows_of(problem: CheckProblem, device: torch.device) -> Iterator[Row]:
    """A row for every backend and direction that serves the problem."""
    built = problem.build(device)
    expected: dict[str, Tensor] = {}
    for backend in checked_backends():
        for direction in ("forward", "backward"):
            if direction == "backward" and problem.precision != "native":
                continue
            if backend.refusal(built.question(direction)) is not None:
                continue
            if not expected:
                expected = _run(built, "reference", exact=True)
            yield _row(built, backend.name, direction, expected)


def _row(built: Built, backend: str, direction: str, expected: dict[str, Tensor]) -> Row:
    start = time.perf_counter()
    name = built.problem.name
    try:
        got = _run(built, backend, backward=direction == "backward")
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Row(name, backend, direction, failure=text[:300])
    seconds = time.perf_counter() - start
    parts = ("dq", "dk", "dv") if direction == "backward" else ("out", "lse")
    worst = max(
        ((part, *_distance(built, part, got[part], expected[part])) for part in parts),
        key=lambda x: x[1] / x[2],
    )
    return Row(name, backend, direction, *worst, seconds)


def _run(
    built: Built, backend: str, *, backward: bool = True, exact: bool = False
) -> dict[str, Tensor]:
    """out, lse, and the gradients where they are asked for; ``exact``: in fp32, not quantized."""
    problem = built.problem
    native = problem.precision == "native"
    backward = backward and native
    q, k, v = (
        x.to(torch.float32 if exact else x.dtype, copy=True).requires_grad_(backward)
        for x in built.tensors
    )
    options: dict[str, Any] = {} if native or exact else {"precision": problem.precision}
    out, lse = attention(
        q, k, v, built.mask, is_causal=problem.is_causal, return_lse=True, backend=backend,
        **options,
    )  # fmt: skip
    results = {"out": out.detach(), "lse": lse.detach()}
    if backward:
        grads = torch.autograd.grad(out, (q, k, v), built.grad.to(out.dtype))
        results |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return results


def _distance(built: Built, part: str, got: Tensor, expected: Tensor) -> tuple[float, float]:
    """(error, allowed); an error of infinity where one is -inf or NaN and the other is not."""
    problem = built.problem
    if part == "lse":
        blind = expected.isneginf()
        if not torch.equal(got.isneginf(), blind) or got.isnan().any():
            return float("inf"), ALLOWED_LSE[problem.precision]
        apart = (got - expected).masked_fill(blind, 0).abs().max()
        return float(apart), ALLOWED_LSE[problem.precision]
    limit = ALLOWED_CODES.get(problem.precision, ALLOWED[problem.dtype])
    error = relative_error(got, expected)
    return (error if error == error else float("inf")), limit
