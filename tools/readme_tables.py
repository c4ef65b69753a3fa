"""Rewrite the generated tables of README.md and docs/: python tools/readme_tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Backends come from the
registry, variables from the table that `video-attn info` prints, figures from benchmarks/results.
A test fails when a file does not hold what this script would write.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import benchmark_summary
import torch

from video_attn import ops  # noqa: F401  fills the registry
from video_attn.registry import PRECISIONS, Backend, Problem, backends
from video_attn.tools.environment import VARIABLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = (
    "README.md", "docs/backends.md", "docs/benchmarks.md", "docs/calibrate.md", "docs/compare.md",
    "docs/distributed.md", "docs/install.md", "docs/radial.md",
)  # fmt: skip
MACHINES = {
    "CPU": ("cpu", "cpu"),
    "NVIDIA A100 (sm_80)": ("cuda", "sm_80"),
    "NVIDIA A10, RTX 30 (sm_86)": ("cuda", "sm_86"),
    "NVIDIA L4, L40, RTX 40 (sm_89)": ("cuda", "sm_89"),
    "NVIDIA H100, H200 (sm_90)": ("cuda", "sm_90"),
    "NVIDIA B200 (sm_100)": ("cuda", "sm_100"),
    "NVIDIA RTX 50 (sm_120)": ("cuda", "sm_120"),
    "AMD MI200 (gfx90a)": ("cuda", "gfx90a"),
    "AMD MI300 (gfx942)": ("cuda", "gfx942"),
    "AMD MI350 (gfx950)": ("cuda", "gfx950"),
    "AMD RX 7900 (gfx1100)": ("cuda", "gfx1100"),
    "AMD RX 9070 (gfx1201)": ("cuda", "gfx1201"),
}
TYPICAL = Problem(
    "forward", "cpu", "cpu", torch.bfloat16, 128, 128, q_block_size=64, kv_block_size=64
)
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def backends_table() -> str:
    """Which backend runs on which machine, with all components built."""
    work = {
        "forward": TYPICAL,
        "backward": replace(TYPICAL, direction="backward"),
        **{f"`{p}`": replace(TYPICAL, precision=p) for p in PRECISIONS if p != "native"},
    }
    rows = []
    for machine, (device_type, arch) in MACHINES.items():
        problems = [replace(p, device_type=device_type, arch=arch) for p in work.values()]
        rows.append([machine, *(_first_that_serves(problem) for problem in problems)])
    return markdown(["machine", *work], rows)


def _first_that_serves(problem: Problem) -> str:
    return next((b.name for b in backends() if _refusal(b, problem) is None), "–")


def _refusal(backend: Backend, problem: Problem) -> str | None:
    """Why not, on a machine where the backend is available."""
    if problem.direction == "backward" and backend.backward is None:
        return "has no backward pass"
    return backend.supports(problem)


def features_table() -> str:
    """What each backend can do, on the first machine of the list that it knows."""
    homes = {backend: _home(backend) for backend in backends()}
    names = [f"{b.name} ({home.arch}, {home.precision})" for b, home in homes.items()]
    rows = []
    for feature, change in _features().items():
        refusals = [_refusal(b, replace(home, **change)) for b, home in homes.items()]
        rows.append([feature, *("yes" if r is None else f"no: {r}" for r in refusals)])
    return markdown(["", *names], rows)


def _home(backend: Backend) -> Problem:
    """The first typical problem that the backend serves: its machine and its precision."""
    dense = replace(TYPICAL, q_block_size=None, kv_block_size=None)
    for typical, precision in product((TYPICAL, dense), PRECISIONS):
        for device_type, arch in MACHINES.values():
            problem = replace(typical, device_type=device_type, arch=arch, precision=precision)
            if backend.supports(problem) is None:
                return problem
    raise ValueError(
        f"backend {backend.name} serves head_dim 128 in bfloat16 on no machine of MACHINES: add "
        "its machine there"
    )


def _features() -> dict[str, dict[str, Any]]:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return {
        **{str(d).removeprefix("torch."): {"dtype": d} for d in dtypes},
        **{f"head_dim {d}": {"head_dim": d, "head_dim_v": d} for d in (8, 40, 64, 128, 256)},
        "head_dim 128, value head_dim 64": {"head_dim_v": 64},
        **{f"blocks of {n}": {"q_block_size": n, "kv_block_size": n} for n in (8, 100, 128, 384)},
        "query blocks of 128, key blocks of 64": {"q_block_size": 128},
        "dense": {"q_block_size": None, "kv_block_size": None},
        "dense, causal": {"q_block_size": None, "kv_block_size": None, "is_causal": True},
        "backward": {"direction": "backward"},
        **{f"precision {p}": {"precision": p} for p in PRECISIONS},
    }


def environment_table() -> str:
    """Every environment variable."""
    rows = [[f"`{v.name}`", v.when, v.values, v.default, v.effect] for v in VARIABLES]
    return markdown(["variable", "read at", "values", "default", "effect"], rows)


def benchmarks_table(prefix: str = "bench_") -> str:
    """The records in benchmarks/results whose benchmark begins so, with their circumstances."""
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))
    ]
    shown = [record_table(r) for r in records if r["benchmark"].startswith(prefix)]
    return "\n".join(shown) or "No records of these scripts are in this version: run them.\n"


def record_table(record: dict[str, Any]) -> str:
    """One record: what all its rows share in a sentence, the rest in a table."""
    results = record["results"]
    problems = [result["problem"] for result in results]
    names = dict.fromkeys(name for problem in problems for name in problem)
    varying = [n for n in names if len({str(problem.get(n)) for problem in problems}) > 1]
    same = [f"{_words(n)} {_value(problems[0][n])}" for n in names if n not in varying]
    metrics = dict.fromkeys(name for result in results for name in result["metrics"])
    state = [n for n in ("sm_mhz", "watts") if any(n in result for result in results)]
    rows = [
        [
            *(_value(result["problem"].get(name, "")) for name in varying),
            result["provider"],
            _time(result),
            *(_value(result["metrics"].get(name, "")) for name in metrics),
            *(_value(result.get(name, "")) for name in state),
        ]
        for result in results
    ]
    header = [*map(_words, varying), "by", "median ms (p20 to p80)"]
    header += [_words(name) for name in (*metrics, *state)]
    machine, versions = record["machine"], record["versions"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    caption = (
        f"`{record['benchmark']}` on {device} ({record['date'][:10]}, commit {record['commit']}, "
        f"torch {versions['torch']}): {', '.join(same)}."
    )
    if "note" in record:
        caption += f" {record['note'].capitalize()}."
    return f"{caption}\n\n{markdown(header, rows)}"


def _time(result: dict[str, Any]) -> str:
    if "failure" in result:
        return f"did not run: {result['failure']}"
    return f"{result['median_ms']:.4g} ({result['p20_ms']:.4g} to {result['p80_ms']:.4g})"


def gpu_table() -> str:
    """Ours and the fastest peer of the same run, for the README."""
    rows = benchmark_summary.summary_rows()
    table = markdown(["problem", "the fastest of ours", "the fastest peer", "times"], rows)
    return f"{benchmark_summary.card()}; TFLOPS count attended pairs:\n\n{table}"


def models_table() -> str:
    """Whole transformers, for the README: a table for each card, a row for each precision; the
    longest calls first.
    """
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("models_*.json"))
    ]
    records.sort(key=lambda record: -record["results"][0].get("median_ms", 0.0))
    cards = dict.fromkeys(record["machine"]["gpu"] for record in records)
    return "\n".join(_models_of(card, records) for card in cards)


def _models_of(card: str, records: Sequence[dict[str, Any]]) -> str:
    shown = [record for record in records if record["machine"]["gpu"] == card]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in (result for record in shown for result in record["results"]):
        problem = result["problem"]
        model = f"{problem['model']}, {_count(problem['layers'], 'layer')}"
        precision = "bf16" if problem["precision"] == "native" else f"`{problem['precision']}`"
        row = model, precision + (", compiled" if problem["compiled"] else "")
        cells.setdefault(row, {})[problem["attention"]] = _model_cell(result)
    patterns = list(dict.fromkeys(pattern for row in cells.values() for pattern in row))
    rows = [[*row, *(found.get(p, "") for p in patterns)] for row, found in cells.items()]
    titles = {"sta": "STA", "vsa": "VSA"}
    table = markdown(["transformer", "in", *(titles.get(p, p) for p in patterns)], rows)
    return f"{benchmark_summary.circumstances(shown)}:\n\n{table}"


def _model_cell(result: dict[str, Any]) -> str:
    """Milliseconds, times the model as it is, error of attention; a failure has none of these."""
    if "failure" in result:
        return "–"
    metrics = result["metrics"]
    error = metrics.get("attention_error")
    words = [f"{result['median_ms']:.0f} ms", f"{metrics['speed_up']:.2f}×"]
    return ", ".join(words if error is None else [*words, f"{error:.1%}"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "×".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table, aligned so that it can be read as text."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * w for w in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "backends": backends_table,
    "features": features_table,
    "environment": environment_table,
    "benchmarks": benchmarks_table,
    "gpu": gpu_table,
    "models": models_table,
    "calibrate": lambda: benchmarks_table("calibrate"),
    "distributed": lambda: benchmarks_table("distributed"),
    "kernels": lambda: benchmarks_table("kernel_bench"),
    "radial": lambda: benchmarks_table("radial_"),
}


def updated(text: str) -> str:
    """``text`` with every table as it should be now.

    Raises:
        KeyError: a marker names a table that nobody makes.
    """
    return _TABLE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> int:
    """Rewrites the files and names those that changed."""
    os.environ.pop("TRITON_INTERPRET", None)  # the tables are about machines
    for name in FILES:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = updated(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print("updated", name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
