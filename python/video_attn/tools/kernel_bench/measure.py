"""Runs the kernels on the cases: checks, times in turn, derives every metric from those times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench import Timing, time_interleaved
from .cases import Case
from .compare import BOUNDS, EXACT, Statistics, compare
from .kernels import Kernel, prepare, synchronize

_BUDGET = {"cuda": 1.0, "cpu": 0.5}  # seconds of timed calls per case, when repeats are not given
_MIN_REPEATS, _MAX_REPEATS = 3, 50


@dataclass(frozen=True)
class Settings:
    """How to benchmark.

    Args:
        kernels: attention types. device: where. repeats: timed calls, None for as many as fit into
            a second. smooth_k: of INT8 kernels.
        reference: None for no comparison, "torch" for exact attention, or an attention type.
        reference_rows: rows of each head that are compared, None for all.
        output_dir: where outputs are saved, None for nowhere.
    """

    kernels: Sequence[str]
    device: torch.device
    repeats: int | None = None
    smooth_k: bool = True
    reference: str | None = None
    reference_rows: int | None = None
    output_dir: Path | None = None


@dataclass
class Row:
    """One kernel on one case. ``error``: why there is no result; ``verdict``: "ok" or what is wrong
    with it; "" where nothing was compared.
    """

    case: Case
    kernel: str
    backend: str = ""
    precision: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)  # "total", "kernel", "quantize"
    nbytes: int = 0
    statistics: Statistics | None = None
    verdict: str = ""
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) or self.verdict not in ("", "ok")

    @property
    def flops(self) -> float:
        return self.case.sizes.flops(self.case.is_causal)

    @property
    def kernel_seconds(self) -> float:
        """Of the kernel alone, or of all where one operator does both."""
        return self.timings.get("kernel", self.timings["total"]).median

    def metrics(self) -> dict[str, float]:
        """Everything that follows from the times, the unit in each name."""
        seconds, total = self.kernel_seconds, self.timings["total"].median
        return {
            "tflops": self.flops / seconds / 1e12,
            "tflops_with_quantization": self.flops / total / 1e12,
            "gb_per_s": self.nbytes / seconds / 1e9,
            "flop_per_byte": self.flops / self.nbytes,
        }


Advance = Callable[[str], None]


def benchmark(case: Case, settings: Settings, advance: Advance) -> list[Row]:
    """All kernels on one case, in turn. A kernel that fails has a row that says why."""
    if settings.device.type == "cuda" and settings.device.index is not None:
        torch.cuda.set_device(settings.device)  # where the clock's events are
    try:
        qkv = case.make(settings.device)
    except RuntimeError as error:  # torch.OutOfMemoryError
        return [Row(case, name, error=str(error)) for name in settings.kernels]
    rows, kernels = [], {}
    for name in settings.kernels:
        advance(f"{case.name}: {name}, first run")
        row = Row(case, name)
        rows.append(row)
        try:
            kernels[name] = prepare(name, case, qkv, settings.smooth_k)
            synchronize(settings.device)
        except (RuntimeError, ValueError, TypeError) as error:  # torch.OutOfMemoryError too
            row.error = str(error)
            continue
        row.backend, row.precision = kernels[name].backend, kernels[name].precision
        row.nbytes = kernels[name].nbytes
        if settings.output_dir is not None:
            _save(settings.output_dir, row, kernels[name].run())
    if settings.reference is not None:
        _compare(case, qkv, settings, [row for row in rows if not row.error], kernels, advance)
    advance(f"{case.name}: timing")
    timings = _time(kernels, settings)
    for row in rows:
        if not row.error:
            row.timings = timings[row.kernel]
    return rows


def _compare(
    case: Case,
    qkv: tuple[Tensor, Tensor, Tensor],
    settings: Settings,
    rows: Sequence[Row],
    kernels: dict[str, Kernel],
    advance: Advance,
) -> None:
    """Fills in statistics and verdicts."""
    expected, slack = None, EXACT
    if settings.reference != "torch":
        assert settings.reference is not None
        try:
            kernel = prepare(settings.reference, case, qkv, smooth_k=True)
        except (RuntimeError, ValueError, TypeError) as error:
            for row in rows:
                row.verdict = f"the reference {settings.reference} cannot run: {error}"
            return
        expected, slack = kernel.run(), BOUNDS[kernel.precision]
    for row in rows:
        advance(f"{case.name}: {row.kernel} against {settings.reference}")
        row.statistics = compare(
            kernels[row.kernel].run(), case, qkv,
            reference=expected, rows=settings.reference_rows,
        )  # fmt: skip
        bound = BOUNDS[row.precision].plus(slack)
        row.verdict = bound.broken_by(row.statistics) or "ok"


def _time(kernels: dict[str, Kernel], settings: Settings) -> dict[str, dict[str, Timing]]:
    """The times of each kernel and of its parts, all in turn."""
    runs: dict[str, Callable[[], object]] = {}
    for name, kernel in kernels.items():
        runs[f"{name} total"] = kernel.run
        if kernel.quantize is not None and kernel.attend is not None:
            runs[f"{name} quantize"] = kernel.quantize
            runs[f"{name} kernel"] = kernel.attend
    if not runs:
        return {}
    repeats = settings.repeats
    if repeats is None:
        once = time_interleaved(runs, device=settings.device, repeats=1, warmup=0)
        seconds = sum(timing.median for timing in once.values())
        budget = _BUDGET[settings.device.type]
        repeats = max(_MIN_REPEATS, min(_MAX_REPEATS, int(budget / max(seconds, 1e-9))))
    timings = time_interleaved(runs, device=settings.device, repeats=repeats)
    found: dict[str, dict[str, Timing]] = {name: {} for name in kernels}
    for key, timing in timings.items():
        name, _, part = key.rpartition(" ")
        found[name][part] = timing
    for name, kernel in kernels.items():
        if not kernel.is_quantized:
            found[name]["kernel"] = found[name]["total"]
    return found


def _save(folder: Path, row: Row, out: Any) -> None:
    """The output [B, Hq, Sq, Dv] as ``KERNEL_CASE.safetensors``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{row.kernel}_{row.case.name.replace(':', '-')}.safetensors"
    facts = {"kernel": row.kernel, "backend": row.backend, "case": row.case.name}
    save_file({"out": out.cpu().contiguous()}, folder / name, metadata=facts)
