"""What every benchmark script needs: fair timing, a record with its circumstances, a table.

A benchmark checks its results first (:func:`require_correct`), times all peers in turn in the same
run (:func:`time_interleaved`), prints a table and writes one JSON record
(:func:`write_record`) that says on which machine, with which versions and from which commit.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import native
from ..device import device_info

_ROOT = Path(__file__).resolve().parents[3]
_PACKAGES = ("torch", "triton", "video-attn", "numpy", "diffusers")
_FLUSH_BYTES = 256 << 20  # larger than the L2 cache of any GPU served


class WrongResultError(RuntimeError):
    """A result failed its check: it is not timed."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call, measured one by one."""

    samples: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """The sample below which ``share`` of the samples lie, between neighbours interpolated."""
        ordered = sorted(self.samples)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def __str__(self) -> str:
        return (
            f"{self.median * 1e3:.2f} ms "
            f"({self.quantile(0.2) * 1e3:.2f} to {self.quantile(0.8) * 1e3:.2f})"
        )


@dataclass(frozen=True)
class Result:
    """One line of a record: what was run, how long it took, what follows from that.

    Args:
        problem: everything that defines the input (shape, dtype, mask, pass).
        provider: who computed it. timing: seconds.
        metrics: derived figures by name, each with its unit in the name (``tflops``, ``speed_up``).
    """

    problem: Mapping[str, Any]
    provider: str
    timing: Timing
    metrics: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        times = {
            f"{name}_ms": round(self.timing.quantile(share) * 1e3, 4)
            for name, share in (("p20", 0.2), ("median", 0.5), ("p80", 0.8))
        }
        return {
            "problem": dict(self.problem),
            "provider": self.provider,
            **times,
            "samples": len(self.timing.samples),
            "metrics": {name: float(f"{value:.5g}") for name, value in self.metrics.items()},
        }


@dataclass(frozen=True)
class Record:
    """The results of one run of a benchmark, with its circumstances."""

    benchmark: str
    results: Sequence[Result]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    date: str

    @classmethod
    def of(cls, benchmark: str, results: Sequence[Result], device: torch.device | str) -> Record:
        """A record of now and here."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(benchmark, results, machine_info(device), versions(), commit(), now)


def time_interleaved(
    providers: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    repeats: int = 10,
    warmup: int = 1,
    flush: bool = True,
) -> dict[str, Timing]:
    """Times every provider ``repeats`` times, in turn: a slow spell of the machine hits all alike.

    Every other round goes backwards, so that nobody always runs after the same neighbour. On a GPU
    the times are those between two events around each call, and ``flush`` empties the L2 cache
    before it.

    Raises:
        ValueError: ``repeats`` < 1 or ``warmup`` < 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, got {repeats} and {warmup}")
    clock = _CudaClock(flush) if torch.device(device).type == "cuda" else _CpuClock()
    for run in providers.values():
        for _ in range(warmup):
            clock.time(run)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for n in range(repeats):
        for name in list(providers) if n % 2 == 0 else reversed(list(providers)):
            samples[name].append(clock.time(providers[name]))
    return {name: Timing(tuple(times)) for name, times in samples.items()}


class _CpuClock:
    def time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class _CudaClock:
    def __init__(self, flush: bool) -> None:
        self._scratch = torch.empty(_FLUSH_BYTES if flush else 0, dtype=torch.int8, device="cuda")

    def time(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| over |expected|, both as Euclidean norms in fp64."""
    expected = expected.double()
    norm = expected.norm()
    return float((got.double() - expected).norm() / norm) if norm > 0 else float(got.norm())


def require_correct(name: str, got: Tensor, expected: Tensor, limit: float) -> float:
    """The relative error of ``got``, if it is finite and at most ``limit``.

    Raises:
        WrongResultError: it is not. There is nothing to time then.
    """
    error = relative_error(got, expected)
    if not error <= limit:  # NaN too
        raise WrongResultError(
            f"{name}: relative error {error:.2e} is above {limit:.2e}: not timed"
        )
    return error


def machine_info(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Facts about this machine that explain a timing."""
    info: dict[str, Any] = {
        "cpu": device_info("cpu").name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        info["gpu"] = properties.name
        info["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        info["gpu_multiprocessors"] = properties.multi_processor_count
        info["toolkit"] = torch.version.hip or torch.version.cuda
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        info["driver"] = driver.splitlines()[0] if driver else "unknown"
    return info


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the source tree, "+" when it has changes; of the build where there is no tree.

    The records themselves are no change.
    """
    revision = _output("git", "rev-parse", "--short=12", "HEAD", cwd=_ROOT)
    if not revision:
        return str(native.component("cpu").record.get("git_revision") or "unknown")
    status = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", cwd=_ROOT)
    return revision + ("+" if status else "")


def write_record(record: Record, path: Path) -> None:
    """Writes ``record`` as JSON, making the folder if need be."""
    data = {**asdict(record), "results": [result.as_dict() for result in record.results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output; the first column to the left, figures to the right."""
    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if os.isatty(1) else 160).print(table)


def _output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; "" where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
