"""The benchmark at its small sizes; run by the pool."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def small(group: Any, out: str, arguments: list[str]) -> None:
    sys.path.insert(0, str(FOLDER))
    small = ["--device", "cpu", "--repeats", "1", "--models", "hunyuan", "--output", out]
    assert import_module("bench_distributed").main([*small, *arguments]) == 0
