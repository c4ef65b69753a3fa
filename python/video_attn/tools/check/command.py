"""``video-attn check``: what a person runs after installing.

Small problems of every kind on every backend and direction that is here, compared with the
reference in fp32. The first wrong row is a reason not to use this install: exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ...device import device_info
from ...registry import PRECISIONS, backends
from ..devices import chosen_device
from ..options import positive_float
from .problems import problems
from .run import Row, rows_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn check``."""
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda if there, else cpu)")
    parser.add_argument("--quick", action="store_true", help="one problem of each kind")
    parser.add_argument(
        "--seconds", type=positive_float, default=60.0, metavar="S",
        help="begin no other problem after that time (default 60)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0 when every row is right, 1 otherwise."""
    device = chosen_device(args.device)
    facts, start = device_info(device), time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows, left = _rows(device, args.quick, start + args.seconds)
    console.print(_table(rows, f"{facts.name} ({facts.arch}), torch {torch.__version__}"))
    for row in rows:
        if row.failure:
            name = f"{row.problem}, {row.backend}, {row.direction}"
            console.print(f"{name}: {row.failure}", style="red", highlight=False)
    for backend in backends():
        if (reason := backend.available()) is not None:
            console.print(f"{backend.name} is not here: {reason}", highlight=False)
    wrong = sum(not row.right for row in rows)
    seconds = time.perf_counter() - start
    served = {row.backend for row in rows}
    if not rows:
        console.print(f"no backend but the slow reference runs on {device}: see video-attn info")
        return 1
    console.print(
        f"{len(rows) - wrong} of {len(rows)} right on {', '.join(sorted(served))} "
        f"in {seconds:.0f} s"
    )
    if left:
        console.print(
            f"not reached: {', '.join(left)}. Kernels that were compiled are kept: run it again, "
            "or with more --seconds"
        )
    return int(wrong > 0)


def _rows(device: torch.device, quick: bool, end: float) -> tuple[list[Row], list[str]]:
    """All rows, one problem of each kind first, and the problems whose turn did not come.

    After a CUDA error a process can do nothing more: those until then.
    """
    todo = sorted(problems(PRECISIONS, quick), key=lambda problem: not problem.quick)
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking", total=len(todo))
        for number, problem in enumerate(todo):
            if time.perf_counter() > end:
                return rows, [later.name for later in todo[number:]]
            progress.update(task, description=problem.name)
            for row in rows_of(problem, device):
                rows.append(row)
                if "CUDA error" in row.failure:
                    return rows, []
            progress.advance(task)
    return rows, []


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("problem", "backend", "direction", "of", "error", "allowed", "ms", ""):
        right = column in ("error", "allowed", "ms")
        table.add_column(column, justify="right" if right else "left")
    for row in rows:
        figures = (row.part, f"{row.error:.1e}", f"{row.allowed:.1e}", f"{row.seconds * 1e3:.0f}")
        if row.failure:
            figures = ("", "", "", "")
        verdict = "[green]right" if row.right else "[red]FAILED" if row.failure else "[red]WRONG"
        table.add_row(row.problem, row.backend, row.direction, *figures, verdict)
    return table
