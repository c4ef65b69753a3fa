"""Converters of command line words, for argparse: each raises with what was given and what fits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path


def positive_int(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number above 0, at most 1."""
    value = positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def sizes(*forms: str) -> Callable[[str], tuple[int, ...]]:
    """A converter of positive sizes in one of the ``forms``, such as "HxW" or "TxHxW"."""
    counts = [len(form.split("x")) for form in forms]

    def convert(text: str) -> tuple[int, ...]:
        parts = text.lower().split("x")
        if len(parts) not in counts or not all(p.isdecimal() and int(p) > 0 for p in parts):
            wanted = " or ".join(forms)
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} in whole numbers above 0")
        return tuple(map(int, parts))

    return convert


def file_ending_in(suffixes: Sequence[str]) -> Callable[[str], Path]:
    """A converter to a path with one of the ``suffixes``."""

    def convert(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(suffixes)}")
        return path

    return convert


def integers(text: str) -> list[int]:
    """Whole numbers with commas between them: "0,15,30"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between them")
    return [int(part) for part in parts]


def names(text: str) -> list[str]:
    """Words with commas between them: "sdpa,sagev1"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not words with commas between them")
    return parts


def scene_adjacency(text: str) -> str | list[list[bool]]:
    """Which scene sees which: "adjacent", "all", or a row of 0 and 1 per scene: "110,111,011"."""
    if text in ("adjacent", "all"):
        return text
    if not text or set(text) - set("01,"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not adjacent, all, or rows of 0 and 1 with commas between them"
        )
    return [[digit == "1" for digit in row] for row in text.split(",")]
