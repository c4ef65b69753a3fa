"""The demo's measurements: each pattern's time, its error, and what it keeps of dense attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...calls import problem_of
from ...registry import Problem, forced_backend, select, why_not
from ..bench import Timing, relative_error, time_interleaved
from .patterns import PATTERNS, Call, Settings, block_weights, kept_weight
from .tokens import Tokens

Advance = Callable[[int, int, str], None]  # told the steps done, all steps, and what comes next


class Measured(NamedTuple):
    """One pattern on one clip.

    Args:
        name, title: of the pattern. density: attended pairs over all pairs.
        kept_weight: the share of dense attention's softmax weight on the attended pairs.
        error: relative L2 of the output against the first pattern. backend: that ran it.
        out: the output in raster order, [1, 3, S, 64].
        weights: dense attention's weight per block, [3, Nq, Nk], None for dense attention.
        kept: the blocks that are kept, bool [1|3, Nq, Nk].
    """

    name: str
    title: str
    density: float
    kept_weight: float
    timing: Timing
    error: float
    backend: str
    out: Tensor
    weights: Tensor | None = None
    kept: Tensor | None = None


class Outcome(NamedTuple):
    """All patterns, the baseline first, and why the backends are those they are."""

    patterns: list[Measured]
    dense_weights: Tensor  # per block, in the order of the first sparse pattern, [3, Nq, Nk]
    backend_reasons: list[str]  # one sentence for each kind of call
    ordering: Timing  # of q, k, v to a pattern's order, and of the output back

    @property
    def baseline(self) -> Measured:
        return self.patterns[0]

    @property
    def sparse(self) -> list[Measured]:
        return [measured for measured in self.patterns if measured.kept is not None]

    def speedup(self, measured: Measured) -> float:
        """How many times as fast as the baseline."""
        return self.baseline.timing.median / measured.timing.median


@torch.no_grad()
def compare(tokens: Tokens, settings: Settings, repeats: int, advance: Advance) -> Outcome:
    """Runs every pattern once, then ``repeats`` times in turn, then looks at the weights."""
    device = tokens.q.device
    calls = {name: pattern.prepare(tokens, settings) for name, pattern in PATTERNS.items()}
    with_mask = {call.order_name: call for call in calls.values() if call.mask is not None}
    steps = _Steps(len(calls) * (1 + repeats) + len(with_mask) + 1, advance)
    outs = {}
    for name, call in calls.items():  # the first run compiles and allocates: it is not timed
        steps.next(f"first run: {PATTERNS[name].title}")
        outs[name] = call.restore(call.run())
    samples: dict[str, tuple[float, ...]] = dict.fromkeys(calls, ())
    for turn in range(repeats):
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            steps.next(PATTERNS[name].title)
            once = time_interleaved({name: calls[name].run}, device=device, repeats=1, warmup=0)
            samples[name] += once[name].samples
    weights = {}
    for name, call in with_mask.items():
        steps.next("weights of dense attention")
        weights[name] = block_weights(tokens, call)
    steps.next("order of tokens")
    ordering = _ordering(tokens, calls)
    steps.next("done")
    exact = next(iter(outs.values()))
    patterns = []
    for name, call in calls.items():
        measured = Measured(
            name, PATTERNS[name].title, 1.0, 1.0, Timing(samples[name]),
            relative_error(outs[name], exact), _backend(tokens, call), outs[name],
        )  # fmt: skip
        patterns.append(_with_mask(measured, call, weights.get(call.order_name)))
    first = next(iter(weights.values())).cpu()
    return Outcome(patterns, first, _backend_reasons(tokens, calls), ordering)


class _Steps:
    """Counts the steps and tells of each one before it begins."""

    def __init__(self, total: int, advance: Advance) -> None:
        self.total, self.advance, self.done = total, advance, -1

    def next(self, what: str) -> None:
        self.done += 1
        self.advance(self.done, self.total, what)


def _with_mask(measured: Measured, call: Call, weights: Tensor | None) -> Measured:
    if call.mask is None or weights is None:
        return measured
    return measured._replace(
        density=call.mask.density(),
        kept_weight=kept_weight(weights, call.mask),
        weights=weights.cpu(),
        kept=call.mask.to_dense()[0].cpu(),
    )


def _ordering(tokens: Tokens, calls: dict[str, Call]) -> Timing:
    """The slowest of the patterns' ways to their own order and back."""
    runs = {name: partial(_there_and_back, call, tokens) for name, call in calls.items()}
    timings = time_interleaved(runs, device=tokens.q.device, repeats=3)
    return max(timings.values(), key=lambda timing: timing.median)


def _there_and_back(call: Call, tokens: Tokens) -> Tensor:
    ordered = [call.order(x) for x in (tokens.q, tokens.k, tokens.v)]
    return call.restore(ordered[0])


def _problem(tokens: Tokens, call: Call) -> Problem:
    return problem_of("forward", tokens.q, tokens.k, tokens.v, call.mask)


def _backend(tokens: Tokens, call: Call) -> str:
    return select(_problem(tokens, call)).name if call.is_ours else "torch"


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
