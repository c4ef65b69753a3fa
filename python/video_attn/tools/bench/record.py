"""Results with their circumstances (machine, versions, commit), as JSON and as a table."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ... import native
from ...device import device_info
from .timing import Timing

_ROOT = Path(__file__).resolve().parents[4]
_PACKAGES = ("torch", "triton", "video-attn", "numpy", "diffusers")


@dataclass(frozen=True)
class Result:
    """One line of a record: what was run, how long it took, what follows from that.

    Args:
        problem: everything that defines the input (shape, dtype, mask, pass).
        provider: who computed it. timing: seconds; None where the provider could not run.
        metrics: derived figures by name, each with its unit in the name (``tflops``, ``speed_up``).
        failure: why there is no timing.
    """

    problem: Mapping[str, Any]
    provider: str
    timing: Timing | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""

    def as_dict(self) -> dict[str, Any]:
        if self.timing is None:
            failed = {"provider": self.provider, "failure": self.failure}
            return {"problem": dict(self.problem), **failed, "metrics": {}}
        state = {"sm_mhz": self.timing.sm_mhz, "watts": self.timing.watts}
        times = {
            f"{name}_ms": round(self.timing.quantile(share) * 1e3, 4)
            for name, share in (("p20", 0.2), ("median", 0.5), ("p80", 0.8))
        }
        return {
            "problem": dict(self.problem),
            "provider": self.provider,
            **times,
            "samples": len(self.timing.samples),
            **{name: round(value) for name, value in state.items() if value is not None},
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


def record_path(name: str, device: torch.device | str) -> Path:
    """benchmarks/results/NAME_MODEL.json; MODEL is cpu or that of the GPU (h100, mi300x)."""
    model = "cpu"
    if torch.device(device).type != "cpu":
        words = device_info(torch.device(device)).name.lower().split()
        model = next((word for word in words if any(c.isdigit() for c in word)), "gpu")
    return _ROOT / "benchmarks" / "results" / f"{name}_{model}.json"


def write_record(record: Record, path: Path) -> None:
    """Writes ``record`` as JSON, making the folder if need be."""
    data = {**asdict(record), "results": [result.as_dict() for result in record.results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output; the first column to the left, figures to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # a "[" in a name is no markup
    Console(width=None if os.isatty(1) else 160).print(table)


def _output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; "" where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
