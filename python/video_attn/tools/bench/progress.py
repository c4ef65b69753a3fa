"""What a long benchmark is doing, on standard error: a line for each step, with the time so far."""

from __future__ import annotations

import sys
import time

_START = time.perf_counter()


def elapsed() -> float:
    """Seconds since the benchmark began."""
    return time.perf_counter() - _START


def say(step: str) -> None:
    """Shows that ``step`` begins now."""
    print(f"{elapsed():7.1f} s  {step}", file=sys.stderr, flush=True)
