"""How fast a row of an NVIDIA launch table should be, from what the compiler made of it.

    python benchmarks/row_model.py benchmarks/results/triton_tune_h100.json

The logarithm of a rate is taken as a sum: of the query or key rows and the warps that an SM holds
at a time, of the rows of a tile and of a step, of having two stages only, and of spills. Only
ratios between rows of one case (kernel, head dim, length of slots) mean anything. The weights were
fitted on the rows that an H100 timed. Printed: for each case of a record how well the model ranks
its rows, with the weights below and with those fitted on all other cases; then the fit on all.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from video_attn.kernels.launch_tables import SHARED_MEMORY, LaunchRow

REGISTERS = 65536  # of an SM
WARPS = {"sm_80": 64, "sm_86": 48, "sm_89": 48, "sm_90": 64, "sm_100": 64, "sm_120": 48}
RESERVED = 1024  # bytes of shared memory that each program takes besides its own
RIDGE = 0.3  # keeps the weights of a fit small

# Powers of two of the rate, for twice as much of each; for "two stages" and 64 spilled bytes, once.
WEIGHTS = {
    "rows on an SM": 1.229,
    "warps on an SM": -0.756,
    "rows of a tile": -0.123,
    "rows of a step": 0.300,
    "two stages": -0.132,
    "spills": -0.200,
}


class Made(NamedTuple):
    """What the compiler made: registers of a thread, spilled bytes, bytes of shared memory."""

    registers: float
    spills: float
    shared: float


def terms(row: LaunchRow, made: Made, arch: str) -> list[float]:
    """What ``WEIGHTS`` weigh."""
    registers = math.ceil(made.registers / 8) * 8 * 32 * row.num_warps
    shared = (SHARED_MEMORY[arch] + RESERVED) // (made.shared + RESERVED)
    programs = max(1, min(REGISTERS // registers, shared, WARPS[arch] // row.num_warps))
    return [
        math.log2(programs * row.own),
        math.log2(programs * row.num_warps),
        math.log2(row.own),
        math.log2(row.step),
        float(row.num_stages == 2),
        made.spills / 64,
    ]


def predicted_rates(rows: Sequence[tuple[LaunchRow, Made]], arch: str) -> list[float] | None:
    """Rates of the rows of a case, that of the fastest being 1; None for chips of another kind."""
    if arch not in WARPS:
        return None
    scores = [
        sum(w * x for w, x in zip(WEIGHTS.values(), terms(row, made, arch), strict=True))
        for row, made in rows
    ]
    return [2 ** (score - max(scores)) for score in scores]


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(rank correlation, part of the best rate that the row of the best prediction misses)."""
    p, m = (torch.tensor(x, dtype=torch.float64) for x in (predicted, measured))
    loss = 1 - (m[p.argmax()] / m.max()).item()
    if len(m) < 2:
        return 1.0, loss
    ranks = torch.stack([x.argsort().argsort().double() for x in (p, m)])
    return torch.corrcoef(ranks)[0, 1].item(), loss


# -- a record -------------------------------------------------------------------------------------

Cases = Mapping[tuple, list[tuple[list[float], float]]]


def cases_of(record: Mapping[str, Any]) -> Cases:
    """Case -> (terms, rate) of each of its rows."""
    cases: dict[tuple, list] = {}
    for result in record["results"]:
        problem, metrics = result["problem"], result["metrics"]
        text, packed = result["provider"].removesuffix(")"), ", packed"
        row = LaunchRow(*ast.literal_eval(text.removesuffix(packed) + ")"))
        made = Made(metrics["registers"], metrics["spills"], metrics["shared_bytes"])
        case = cases.setdefault(tuple(problem.values()), [])
        case.append((terms(row, made, problem["arch"]), metrics["tflops"]))
    return cases


def fitted(cases: Cases) -> Tensor:
    """Weights by least squares; every case may have a rate of its own."""
    inputs, outputs = [], []
    for rows in cases.values():
        x = torch.tensor([given for given, _ in rows], dtype=torch.float64)
        y = torch.tensor([rate for _, rate in rows], dtype=torch.float64).log2()
        inputs.append(x - x.mean(0))
        outputs.append(y - y.mean())
    size = len(WEIGHTS)
    inputs.append(RIDGE * torch.eye(size, dtype=torch.float64))
    outputs.append(torch.zeros(size, dtype=torch.float64))
    return torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)[:, None]).solution[:, 0]


def judged(cases: Cases) -> dict[tuple, tuple[tuple[float, float], tuple[float, float]]]:
    """Case -> the agreement of ``WEIGHTS``, and of weights fitted on all other cases."""
    given = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
    found = {}
    for case, rows in cases.items():
        rates = [rate for _, rate in rows]
        x = torch.tensor([terms for terms, _ in rows], dtype=torch.float64)
        others = fitted({other: y for other, y in cases.items() if other != case})
        scores = [(x @ weights).tolist() for weights in (given, others)]
        found[case] = agreement(scores[0], rates), agreement(scores[1], rates)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("record", type=Path, help="that tune_triton.py wrote")
    cases = cases_of(json.loads(parser.parse_args(arguments).record.read_text()))
    grid = Table("case", "rows", "rank correlation", "best choice loses", "by the others", "loses")
    found = judged(cases)
    for case, both in found.items():
        figures = [text for x in both for text in (f"{x[0]:.2f}", f"{x[1]:.1%}")]
        grid.add_row(" ".join(map(str, case)), str(len(cases[case])), *figures)
    mean = torch.tensor([[*a, *b] for a, b in found.values()]).mean(0).tolist()
    grid.add_row(
        "mean", "", *(f"{x:.2f}" if i % 2 == 0 else f"{x:.1%}" for i, x in enumerate(mean))
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(grid)
    weights = zip(WEIGHTS, fitted(cases).tolist(), strict=True)
    console.print("fit:", ", ".join(f"{name} {x:.3f}" for name, x in weights))
    return 0


if __name__ == "__main__":
    sys.exit(main())
