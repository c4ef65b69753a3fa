"""What a benchmark leaves: a table, a CSV with its circumstances, a picture."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..bench import Record, Result, Timing, commit, machine_info, versions
from .measure import Row

# What -metric NAME shows: headings, and the names of the figures.
COLUMNS = {
    "time": [("total ms (p20 to p80)", "total"), ("kernel ms", "kernel"),
             ("quantize ms", "quantize")],
    "throughput": [("TFLOPS", "tflops"), ("with quantization", "tflops_with_quantization")],
    "bandwidth": [("GB/s", "gb_per_s")],
    "arithmetic_intensity": [("FLOP/byte", "flop_per_byte")],
}  # fmt: skip
METRICS = (*COLUMNS, "all")
ERRORS = [("relative L2", "relative_l2"), ("cosine", "cosine"),
          ("worst row", "worst_row_cosine"), ("max error", "max_abs_error"),
          ("mean error", "mean_abs_error")]  # fmt: skip
_PARTS = ("total", "kernel", "quantize")


def shown_columns(metric: str) -> list[tuple[str, str]]:
    """The columns of a metric, or of all."""
    return COLUMNS[metric] if metric != "all" else [x for some in COLUMNS.values() for x in some]


def speed_table(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """(headings, cells) of a metric, or of all."""
    columns = shown_columns(metric)
    headings = ["case", "kernel", "backend", *(title for title, _ in columns)]
    return headings, [
        [row.case.name, row.kernel, row.backend, *(_figure(row, name) for _, name in columns)]
        for row in rows
    ]


def error_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(headings, cells) of the comparison, with its verdicts."""
    headings = ["case", "kernel", "backend", *(title for title, _ in ERRORS), "verdict"]
    cells = []
    for row in rows:
        found = row.statistics.as_dict() if row.statistics else {}
        figures = [f"{found[name]:.6g}" if found else "–" for _, name in ERRORS]
        verdict = "FAILED" if row.failed else row.verdict
        cells.append([row.case.name, row.kernel, row.backend, *figures, verdict])
    return headings, cells


def _figure(row: Row, name: str) -> str:
    if row.error:
        return "failed"
    if name not in _PARTS:
        return f"{row.metrics()[name]:.4g}"
    timing = row.timings.get(name)
    if timing is None:
        return "–"
    if name != "total":
        return f"{timing.median * 1e3:.4g}"
    return f"{timing.median * 1e3:.4g} ({_ms(timing, 0.2):.4g} to {_ms(timing, 0.8):.4g})"


def _ms(timing: Timing, share: float) -> float:
    return timing.quantile(share) * 1e3


def write_csv(rows: Sequence[Row], path: Path, device: torch.device) -> None:
    """One line per case and kernel, with the card, its clock, versions and commit in each.

    Raises:
        OSError: the file cannot be written.
    """
    around = circumstances(device)
    lines = [_line(row) | around for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for x in lines for name in x)))
        writer.writeheader()
        writer.writerows(lines)


def record_of(rows: Sequence[Row], device: torch.device) -> Record:
    """The rows that have figures, in the form of the project's own records; times are total."""
    results = []
    for row in rows:
        if row.error:
            continue
        problem = {
            "case": row.case.name, "dtype": str(row.case.dtype).removeprefix("torch."),
            "causal": row.case.is_causal,
        }  # fmt: skip
        metrics = {
            "kernel_ms": row.kernel_seconds * 1e3,
            **row.metrics(),
            **(row.statistics.as_dict() if row.statistics else {}),
        }
        provider = f"{row.kernel} ({row.backend})"
        results.append(Result(problem, provider, row.timings["total"], metrics))
    return Record.of("kernel_bench", results, device)


def circumstances(device: torch.device) -> dict[str, Any]:
    """What explains a figure: the machine as it is now, versions, commit, date."""
    machine = machine_info(device)
    return {
        "device": machine.get("gpu") or machine["cpu"],
        "threads": machine["threads"],
        "driver": machine.get("driver", ""),
        **{f"version_{name}": version for name, version in versions().items()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _line(row: Row) -> dict[str, Any]:
    sizes, case = row.case.sizes, row.case
    line: dict[str, Any] = {
        "case": case.name, "kernel": row.kernel, "backend": row.backend,
        "precision": row.precision, "batch": sizes.batch, "hq": sizes.heads, "hk": sizes.kv_heads,
        "sq": sizes.q_len, "sk": sizes.kv_len, "d": sizes.head_dim, "dv": sizes.head_dim_v,
        "dtype": str(case.dtype).removeprefix("torch."), "causal": case.is_causal,
    }  # fmt: skip
    line |= {name: case.source.get(name, "") for name in ("file", "layer", "step")}
    for part in _PARTS:
        timing = row.timings.get(part)
        for name, share in (("median", 0.5), ("p20", 0.2), ("p80", 0.8)):
            line[f"{part}_{name}_ms"] = "" if timing is None else f"{_ms(timing, share):.6g}"
    total = row.timings.get("total")
    line["samples"] = len(total.samples) if total else ""
    line["sm_clock_mhz"] = total.sm_mhz or "" if total else ""
    line["watts"] = total.watts or "" if total else ""
    line["flops"], line["bytes"] = f"{row.flops:.6g}", row.nbytes or ""
    metrics = row.metrics() if total else {}
    for name in ("tflops", "tflops_with_quantization", "gb_per_s", "flop_per_byte"):
        line[name] = f"{metrics[name]:.6g}" if name in metrics else ""
    found = row.statistics.as_dict() if row.statistics else {}
    line |= {name: f"{found[name]:.6g}" if name in found else "" for _, name in ERRORS}
    return line | {"verdict": row.verdict, "error": row.error.replace("\n", " ")}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of throughput per kernel, case by case, and beside them the error, where known.

    Raises:
        OSError: the file cannot be written.
    """
    from ..plot import style

    done = [row for row in rows if not row.error]
    compared = any(row.statistics is not None for row in done)
    figure = style.new_figure(11.0, 1.5 + 0.34 * len(done) + 0.2 * len({r.case.name for r in done}))
    style.headline(
        figure,
        "Attention kernels",
        "TFLOPS of 2·B·Hq·Sq·Sk·(D + Dv): the dark bar with quantization, the pale one without"
        + ("; right: relative L2 error against exact attention" if compared else ""),
    )
    height = figure.get_figheight()
    place = 0.5 / height, 1 - 1.45 / height
    axes = figure.add_axes((0.24, place[0], 0.40 if compared else 0.72, place[1]))
    errors = figure.add_axes((0.70, place[0], 0.28, place[1])) if compared else None
    labels, spots, spot = [], [], 0.0
    for n, row in enumerate(done):
        spot += 1.0 if n == 0 or done[n - 1].case.name == row.case.name else 1.6
        metrics = row.metrics()
        axes.barh(spot, metrics["tflops"], 0.7, color=style.SEEN_BEFORE)
        axes.barh(spot, metrics["tflops_with_quantization"], 0.7, color=style.SEEN)
        axes.text(metrics["tflops"], spot, f" {metrics['tflops']:.3g}", va="center", size=8.5)
        labels.append(f"{row.case.name}  {row.kernel}")
        spots.append(spot)
        if errors is not None and row.statistics is not None:
            errors.barh(spot, row.statistics.relative_l2, 0.7, color=style.MIXED)
            text = f" {row.statistics.relative_l2:.2g}"
            errors.text(row.statistics.relative_l2, spot, text, va="center", size=8.5)
    for ax in (axes, errors):
        if ax is not None:
            ax.set_ylim(spot + 0.7, 0.3)
            ax.margins(x=0.15)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_yticks(spots, labels if ax is axes else [""] * len(spots), size=9)
            ax.tick_params(axis="x", labelsize=8.5)
    style.save([style.pixels(figure)], path, fps=1)
