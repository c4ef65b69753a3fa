"""What every benchmark asks and how it ends: options with a default per device, and one record."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES
from peers import CannotRunError

from video_attn.tools.bench import Record, Result, WrongResultError, record_path, write_record


class Options:
    """The options of a benchmark: ``--device`` first, then its own, then ``--output``.

    Args:
        name: of the benchmark and of its record, ``results/NAME_MODEL.json``.
        description: its first line stands in ``--help``.
        script: the name that the record says, if it is not ``bench_NAME``.
    """

    def __init__(self, name: str, description: str, script: str | None = None) -> None:
        self.parser = argparse.ArgumentParser(
            description=description.split("\n")[0], allow_abbrev=False
        )
        self.add = self.parser.add_argument
        self._name, self._script = name, script or f"bench_{name}"
        self._sizes: dict[str, tuple[object, object]] = {}
        gpu = torch.cuda.is_available()
        help = "default: cuda if there, else cpu"
        self.add("--device", default="cuda" if gpu else "cpu", help=help)

    def sized(self, flag: str, on_gpu: Any, on_cpu: Any, help: str, **options: Any) -> None:
        """An option with one default on a GPU and another on a CPU, which the help shows."""
        self._sizes[flag[2:].replace("-", "_")] = (on_gpu, on_cpu)
        self.add(flag, help=f"{help} ({_shown(on_gpu)}; on a CPU {_shown(on_cpu)})", **options)

    def count(self, flag: str, on_gpu: int, on_cpu: int, help: str) -> None:
        self.sized(flag, on_gpu, on_cpu, help, type=int)

    def dtype(self) -> None:
        """``--dtype``, one for the whole run."""
        self.sized("--dtype", "bfloat16", "float32", "of q, k and v", choices=list(DTYPES))

    def switch(self, flag: str, help: str) -> None:
        """On, unless ``--no-...`` is given."""
        self.add(flag, action=argparse.BooleanOptionalAction, default=True, help=help)

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """All of them, and ``script``, which :func:`run_benchmark` puts into the record."""
        self.add("--output", type=Path,
                 help=f"JSON record (benchmarks/results/{self._name}_MODEL.json)")  # fmt: skip
        options = self.parser.parse_args(arguments)
        on_cpu = torch.device(options.device).type == "cpu"
        for name, (on_gpu, small) in self._sizes.items():
            if getattr(options, name) is None:
                setattr(options, name, small if on_cpu else on_gpu)
        options.output = options.output or record_path(self._name, options.device)
        options.script = self._script
        return options


def run_benchmark(
    measure: Callable[[argparse.Namespace], list[Result]], options: argparse.Namespace
) -> int:
    """What ``measure`` gives, in a record; the exit status, 1 where a result of ours is wrong."""
    try:
        results = measure(options)
    except (WrongResultError, CannotRunError) as error:
        print(f"error: {error}")
        return 1
    write_record(Record.of(options.script, results, options.device), options.output)
    print(f"record: {options.output}")
    return 0


def _shown(value: object) -> str:
    """``[(3, 3, 3)]`` as people type it: ``3x3x3``."""
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
