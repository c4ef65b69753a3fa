"""The demo's measurements: each pattern's time, its error, and what it keeps of dense attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..ops import problem_of
from ..registry import Problem, forced_backend, select, why_not
from .demo_patterns import PATTERNS, Call, Settings, block_weights, kept_weight
from .tokens import Tokens

T = TypeVar("T")


class Result(NamedTuple):
    """One pattern on one clip.

    Args:
        name, title: of the pattern. density: attended pairs over all pairs.
        kept_weight: the share of dense attention's softmax weight on the attended pairs.
        seconds: of each timed run. error: relative L2 of the output against dense attention.
        backend: that ran it. out: the output in raster order, [1, 3, S, 64].
        weights: dense attention's weight per block, None for dense attention. kept: its blocks,
            bool [1|3, Nq, Nk].
    """

    name: str
    title: str
    density: float
    kept_weight: float
    seconds: list[float]
    error: float
    backend: str
    out: Tensor
    weights: Tensor | None
    kept: Tensor | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Outcome(NamedTuple):
    """All results, the baseline first, and why the backends are those they are."""

    results: list[Result]
    backend_reasons: list[str]  # one sentence for each kind of call
    ordering_seconds: float  # q, k, v to tile order and the output back

    @property
    def baseline(self) -> Result:
        return self.results[0]


@torch.no_grad()
def compare(
    tokens: Tokens, settings: Settings, repeats: int, advance: Callable[[int, int, str], None]
) -> Outcome:
    """Runs every pattern once to warm up, then ``repeats`` times, one after the other in turn.

    Interleaved runs see the same clock and the same neighbours. ``advance(done, all, what)`` is
    told how far it is.
    """
    calls = {name: pattern.prepare(tokens, settings) for name, pattern in PATTERNS.items()}
    orders = {call.order_name: call for call in calls.values() if call.mask is not None}
    total, done = len(calls) * (repeats + 1) + len(orders), 0
    outs: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            advance(done, total, PATTERNS[name].title)
            out, duration = _timed(call.run, tokens.q.device)
            if turn == 0:  # warm-up: compiles, allocates; its output is the one compared
                outs[name] = call.restore(out)
            else:
                seconds[name].append(duration)
            done += 1
    weights = {}
    for name, call in orders.items():
        advance(done, total, "weights of dense attention")
        weights[name] = block_weights(tokens, call)
        done += 1
    advance(done, total, "done")
    exact = next(iter(outs.values())).float()
    results = [
        _result(name, call, tokens, outs[name], exact, seconds[name], weights.get(call.order_name))
        for name, call in calls.items()
    ]
    return Outcome(results, _backend_reasons(tokens, calls), _ordering_seconds(tokens, calls))


def _timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    _synchronize(device)
    start = time.perf_counter()
    out = run()
    _synchronize(device)
    return out, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _result(
    name: str, call: Call, tokens: Tokens, out: Tensor, exact: Tensor,
    seconds: list[float], weights: Tensor | None,
) -> Result:  # fmt: skip
    error = float((out.float() - exact).norm() / exact.norm())
    backend = select(_problem(tokens, call)).name if call.is_ours else "torch"
    title = PATTERNS[name].title
    if call.mask is None or weights is None:
        return Result(name, title, 1.0, 1.0, seconds, error, backend, out, None, None)
    kept = kept_weight(weights, call.mask)
    blocks = call.mask.to_dense()[0].cpu()
    density = call.mask.density()
    return Result(name, title, density, kept, seconds, error, backend, out, weights.cpu(), blocks)


def _problem(tokens: Tokens, call: Call) -> Problem:
    return problem_of("forward", tokens.q, tokens.k, tokens.v, call.mask)


def _backend_reasons(tokens: Tokens, calls: dict[str, Call]) -> list[str]:
    kinds = {}
    for call in calls.values():
        kind = "dense" if call.mask is None else f"blocks of {call.mask.kv_block_size}"
        kinds[kind] = _why(_problem(tokens, call))
    return [f"{kind}: {why}." for kind, why in kinds.items()]


def _why(problem: Problem) -> str:
    """Why the backend of ``problem`` is the one that it is."""
    forced = forced_backend()
    if forced is not None:
        name, source = forced
        return f"{name}, asked for by {source}"
    verdicts = why_not(problem)
    refused = [f"{v.backend}: {v.reason}" for v in verdicts if v.reason is not None]
    chosen = next(v.backend for v in verdicts if v.chosen)
    return "; ".join([f"{chosen} is the first in order that can serve", *refused])


def _ordering_seconds(tokens: Tokens, calls: dict[str, Call]) -> float:
    """The longest of the patterns' ways to their own order and back."""
    runs = [partial(_there_and_back, call, tokens) for call in calls.values()]
    return max(_timed(run, tokens.q.device)[1] for run in runs)


def _there_and_back(call: Call, tokens: Tokens) -> Tensor:
    ordered = [call.order(x) for x in (tokens.q, tokens.k, tokens.v)]
    return call.restore(ordered[0])
