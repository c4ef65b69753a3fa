"""``video-attn info``: what is here, what it can run, and why the rest cannot.

It is what a person runs when something is wrong, so it never raises: what cannot be found out is
shown as the error it gave. For the same reason nothing but the standard library is imported before
it is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .environment import VARIABLES
from .launch_plan import ARGUMENTS, print_plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..registry import Problem, Verdict

Direction = Literal["forward", "backward"]
Row = dict[str, Any]
PACKAGES = ("torch", "triton", "numpy", "av", "matplotlib", "rich", "diffusers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn info``."""
    parser.add_argument("--json", action="store_true", help="the same facts as one JSON object")
    parser.add_argument(
        "--plan", type=int, nargs=len(ARGUMENTS), metavar=ARGUMENTS,
        help="what the launcher of the Hopper forward kernel plans for such a problem, on an H100",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints the facts, which always succeeds, or a plan."""
    if args.plan:
        return print_plan(args.plan, as_json=args.json)
    facts = collect()
    try:
        if not args.json:
            render(facts)
            return 0
    except ImportError as error:  # no rich
        print(f"(no tables: {error})")
    print(json.dumps(facts, indent=2, default=str))
    return 0


def collect() -> dict[str, list[Row]]:
    """Every fact as plain rows, section by section; one that fails is a row ``{"error": ...}``."""
    sections: dict[str, Callable[[], list[Row]]] = {
        "versions": _versions,
        "devices": _devices,
        "components": _components,
        "backends": _backends,
        "choices": _choices,
        "attention types": _attention_types,
        "environment": _environment,
    }
    return {name: _guarded(section) for name, section in sections.items()}


def _guarded(section: Callable[[], list[Row]]) -> list[Row]:
    try:
        return section()
    except Exception as error:  # whatever is broken is the answer here, not an accident
        return [{"error": _sentence(error)}]


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _versions() -> list[Row]:
    rows: list[Row] = [
        {"what": "video-attn", "version": _version("video-attn"), "note": _source_note()},
        {"what": "python", "version": platform.python_version(), "note": sys.executable},
        {"what": "system", "version": f"{platform.system()} {platform.machine()}",
         "note": platform.release()},
    ]  # fmt: skip
    notes = {"torch": _torch_note}
    for package in PACKAGES:
        note = _guarded_text(notes[package]) if package in notes else ""
        rows.append({"what": package, "version": _version(package), "note": note})
    return rows


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _guarded_text(make: Callable[[], str]) -> str:
    rows = _guarded(lambda: [{"text": make()}])
    return str(rows[0].get("text", rows[0].get("error", "")))


def _source_note() -> str:
    return str(Path(__file__).resolve().parents[1])


def _torch_note() -> str:
    import torch

    if torch.version.hip is not None:
        return f"for ROCm {torch.version.hip}"
    return "for the CPU" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"


def _devices() -> list[Row]:
    import torch

    from ..device import device_info

    cpu = {
        "device": "cpu",
        "name": device_info("cpu").name,
        "arch": torch.backends.cpu.get_cpu_capability(),
        "units": f"{torch.get_num_threads()} threads",
    }
    return [cpu, *(_guarded(_gpus) if torch.cuda.is_available() else [])]


def _gpus() -> list[Row]:
    import torch

    from ..device import device_info

    rows = []
    for index in range(torch.cuda.device_count()):
        facts = device_info(torch.device("cuda", index))
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        units = f"{facts.multiprocessors} {'CUs' if facts.vendor == 'amd' else 'SMs'}"
        rows.append(
            {"device": f"cuda:{index}", "name": facts.name, "arch": facts.arch,
             "units": f"{units}, {memory:.0f} GiB"}
        )  # fmt: skip
    return rows


def _components() -> list[Row]:
    from .. import native

    return [
        {
            "component": component.name,
            "loaded": component.loaded,
            "architectures": " ".join(component.record.get("architectures") or ()),
            "built": _build_note(component.record) if component.loaded else "",
            "reason": component.reason or "",
            "record": dict(component.record),
        }
        for component in native.components()
    ]


def _build_note(record: Mapping[str, Any]) -> str:
    names = {"git_revision": "commit", "torch": "torch", "cuda": "CUDA"}
    return "\n".join(f"{text} {record[name]}" for name, text in names.items() if record.get(name))


def _backends() -> list[Row]:
    from .. import registry

    return [
        {
            "backend": backend.name,
            "priority": backend.priority,
            "backward": backend.backward is not None,
            "reason": _guarded_text(lambda b=backend: b.available() or ""),  # type: ignore[misc]
        }
        for backend in registry.backends()
    ]


def _choices() -> list[Row]:
    from .. import registry

    rows = []
    for name, problem in typical_problems():
        verdicts = registry.why_not(problem)
        others = [f"{v.backend}: {v.reason}" for v in verdicts if v.reason is not None]
        rows.append(
            {"problem": name, "backend": _chosen(problem, verdicts), "why not the others": others}
        )
    return rows


def _chosen(problem: Problem, verdicts: list[Verdict]) -> str:
    from .. import registry

    try:
        if registry.forced_backend() is not None:
            return registry.select(problem).name + " (forced)"
    except (RuntimeError, ValueError) as error:
        return f"none: {_sentence(error)}"
    return next((verdict.backend for verdict in verdicts if verdict.chosen), "none")


def typical_problems() -> list[tuple[str, Problem]]:
    """A few calls as video models make them, (name, Problem), on every kind of device here."""
    import torch

    from ..device import device_info
    from ..registry import Problem

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    kinds = {(facts.type, facts.arch): None for facts in map(device_info, devices)}
    calls: list[tuple[str, Row]] = [
        ("dense", {}),
        ("STA, blocks of 384", {"q_block_size": 384, "kv_block_size": 384}),
        ("VSA, blocks of 64", {"q_block_size": 64, "kv_block_size": 64}),
        ("VSA, blocks of 64, INT8 scores",
         {"q_block_size": 64, "kv_block_size": 64, "precision": "sage_fp16"}),
    ]  # fmt: skip
    problems = []
    for device_type, arch in kinds:
        for name, arguments in calls:
            directions: tuple[Direction, ...] = ("forward", "backward")
            if "precision" in arguments:  # quantized kernels have no backward pass
                directions = ("forward",)
            for direction in directions:
                problem = Problem(
                    direction, device_type, arch, torch.bfloat16, 128, 128, **arguments
                )
                problems.append((f"{arch}: {name}, {direction}", problem))
    return problems


def _attention_types() -> list[Row]:
    """What each name of an attention type stands for here."""
    from ..attention_types import ATTENTION_TYPES
    from ..quantize import recipe_text

    rows: list[Row] = []
    for dense in [problem for name, problem in typical_problems() if "dense, forward" in name]:
        for row in ATTENTION_TYPES.values():
            verdicts = row.why_not(dense)
            chosen = next((n for n, v in enumerate(verdicts) if v.chosen), len(verdicts))
            rows.append(
                {
                    "name": row.name,
                    "on": dense.arch,
                    "precision": recipe_text(row.precision, row.quantization),
                    "backend": verdicts[chosen].backend if chosen < len(verdicts) else "none",
                    "why not those before": [f"{v.backend}: {v.reason}" for v in verdicts[:chosen]],
                }
            )
    return rows


def _environment() -> list[Row]:
    return [
        {**variable._asdict(), "value": os.environ.get(variable.name, "")}
        for variable in VARIABLES
        if variable.when == "run" or variable.name in os.environ
    ]


def render(facts: dict[str, list[Row]], console: Console | None = None) -> None:
    """Prints the sections of :func:`collect` as tables."""
    from rich.console import Console

    console = console or Console()
    for name, rows in facts.items():
        console.print(_table(name, _merged(rows) if name == "choices" else rows))


def _merged(rows: list[Row]) -> list[Row]:
    """The choices, problems with the same answer in one row."""
    merged: dict[str, Row] = {}
    for row in rows:
        if "problem" not in row:  # the section failed
            return rows
        answer = json.dumps({**row, "problem": ""})
        merged.setdefault(answer, {**row, "problem": []})["problem"].append(row["problem"])
    return list(merged.values())


def _table(title: str, rows: list[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if _is_told(c, rows)]
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in _NAMES)
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column, "")), _style(column)) for column in columns))
    return table


_NAMES = ("what", "device", "component", "backend", "name", "version")  # columns not to be broken


def _is_told(column: str, rows: list[Row]) -> bool:
    """Leaves out columns without a single entry, and those that only JSON needs."""
    for_json = ("when", "values", "record")
    return column not in for_json and any(row.get(column, "") != "" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _style(column: str) -> str:
    return {
        "error": "red",
        "reason": "yellow",
        "why not the others": "dim",
        "why not those before": "dim",
    }.get(column, "")
