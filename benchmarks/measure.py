"""Check everybody, then time everybody: what the benchmarks of attention do with a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from cases import Case
from peers import CannotRunError, Provider, Run
from torch import Tensor

from video_attn import attention
from video_attn.tools.bench import (
    Result,
    Timing,
    WrongResultError,
    elapsed,
    require_correct,
    say,
    time_interleaved,
)

# Relative error against the fp32 reference: some roundings of each dtype.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BACKWARD_FACTOR = 2.5  # floating-point operations of backward over forward
SECONDS = 1.0  # of one provider's calls in one table; slow ones are called less often
LIMIT = 85.0  # of a whole run on a GPU: no other peer is taken in after that, to end within 120 s


@dataclass
class Ready:
    """A provider whose result was right: what is timed."""

    provider: Provider
    run: Run
    graph: Tensor | None  # the output with its graph, for the backward pass


def time_case(
    case: Case, providers: Sequence[Provider], repeats: int, with_backward: bool
) -> list[Result]:
    """Every provider forward and, where it has one, backward; checked first.

    All but the dense peers are checked on the timed tensors against the fp32 reference, on the
    first and the last head.

    Raises:
        WrongResultError: a result of ours is off; then nothing is timed.
    """
    expected = _Expected(case, with_backward)
    ready, results = [], []
    for provider in providers:
        say(f"{provider.name}: checking" if not provider.dense else f"{provider.name}: first call")
        try:
            if case.device.type == "cuda" and not provider.ours and elapsed() > LIMIT:
                raise CannotRunError(f"left out: the run was {LIMIT:.0f} s old")
            ready.append(_prepare(provider, case, with_backward, expected))
        except Exception as error:
            if provider.ours:
                raise
            problem = {**case.problem, "pass": ""}
            results.append(Result(problem, provider.name, None, failure=reason_of(error)))
            say(f"{provider.name}: {results[-1].failure}")
            _forget_the_error()
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {r.provider.name: partial(r.run, *case.quiet) for r in ready
                    if r.provider.forward},
        "backward": {r.provider.name: partial(_gradients, r.graph, case) for r in ready
                     if r.graph is not None},
    }  # fmt: skip
    timed = []
    for direction, runs in calls.items():
        if not runs:
            continue
        say(f"timing {len(runs)} {direction} passes")
        seconds = SECONDS if case.device.type == "cuda" else None
        timings = time_interleaved(runs, device=case.device, repeats=repeats, seconds=seconds)
        dense = {r.provider.name for r in ready if r.provider.dense}
        timed += results_of(case, direction, timings, dense)
    return timed + results


def reason_of(error: Exception) -> str:
    """One line of an error, short enough for a table."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _forget_the_error() -> None:
    """A failed attempt leaves memory and, for FlexAttention, a compiler that has given up."""
    with suppress(Exception):
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _prepare(provider: Provider, case: Case, with_backward: bool, expected: _Expected) -> Ready:
    run = provider.prepare(case)
    with_backward = with_backward and provider.backward
    graph = run(*case.tensors) if with_backward else None
    if not provider.dense or case.mask is None:
        got = [run(*case.quiet)]
        if graph is not None:
            got += _gradients(graph, case)
        limit = provider.limit or LIMITS[case.grad.dtype]
        for head, parts in expected.heads().items():
            for part, x, y in zip(("out", "dq", "dk", "dv"), got, parts, strict=False):
                label = f"{provider.name}, {part} of head {head}"
                require_correct(label, x[:, head].detach(), y[:, 0], limit)
    elif not run(*case.quiet).isfinite().all():
        raise WrongResultError(f"{provider.name}: not finite")
    return Ready(provider, run, graph)


class _Expected:
    """out, dq, dk, dv of the reference in fp32 for the first and the last head, computed once."""

    def __init__(self, case: Case, with_backward: bool) -> None:
        self._case, self._with_backward = case, with_backward
        self._heads: dict[int, list[Tensor]] = {}

    def heads(self) -> dict[int, list[Tensor]]:
        if not self._heads:
            say("the reference in fp32")
            for head in {0, self._case.grad.shape[1] - 1}:
                self._heads[head] = self._reference(slice(head, head + 1))
        return self._heads

    def _reference(self, heads: slice) -> list[Tensor]:
        case, mask = self._case, self._case.mask
        if mask is not None and mask.kv_indices.shape[1] > 1:
            counts, indices = mask.kv_num_blocks[:, heads], mask.kv_indices[:, heads]
            mask = replace(mask, kv_num_blocks=counts, kv_indices=indices, _transpose=None)
        with_gradients = self._with_backward
        exact = [x[:, heads].float().requires_grad_(with_gradients) for x in case.quiet]
        qkv = exact if case.raster is None else [case.raster.to_tiles(x) for x in exact]
        out = attention(*qkv, mask, is_causal=case.is_causal, backend="reference")
        if case.raster is not None:
            out = case.raster.from_tiles(out)
        if not with_gradients:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, exact, case.grad[:, heads].float())]


def _gradients(out: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, case.tensors, case.grad, retain_graph=True)


def results_of(
    case: Case, direction: str, timings: dict[str, Timing], dense: set[str]
) -> list[Result]:
    """Effective TFLOPS (real pairs only), per GHz too, and the speed-up over the fastest dense
    peer.
    """
    factor = 1.0 if direction == "forward" else BACKWARD_FACTOR
    fastest = min((t.median for name, t in timings.items() if name in dense), default=None)
    results = []
    for name, timing in timings.items():
        flops = factor * (case.dense_flops if name in dense else case.flops)
        metrics = {"tflops": flops / timing.median / 1e12}
        if timing.sm_mhz:
            metrics["tflops_per_ghz"] = metrics["tflops"] / (timing.sm_mhz / 1e3)
        if fastest is not None:
            metrics["speed_up_over_dense"] = fastest / timing.median
        results.append(Result({**case.problem, "pass": direction}, name, timing, metrics))
    return results


COLUMNS = ("pass", "provider", "median (p20 to p80)", "effective TFLOPS", "per GHz", "over dense",
           "SM MHz", "W")  # fmt: skip


def rows_of(results: Sequence[Result]) -> list[tuple[object, ...]]:
    """Rows for a table with ``COLUMNS``."""
    rows: list[tuple[object, ...]] = []
    for r in results:
        if r.timing is None:
            rows.append(("", r.provider, r.failure[:60], "", "", "", "", ""))
            continue
        figures = [_figure(r.metrics.get(name)) for name in
                   ("tflops", "tflops_per_ghz", "speed_up_over_dense")]  # fmt: skip
        state = [_figure(r.timing.sm_mhz, ".0f"), _figure(r.timing.watts, ".0f")]
        rows.append((r.problem["pass"], r.provider, r.timing, *figures, *state))
    return rows


def _figure(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else f"{value:{form}}"
