"""What ``--attention_type`` may say: a named attention, or a pattern with its options.

``sagev1`` is a name of :data:`video_attn.attention_types.ATTENTION_TYPES`; ``sta:window=3x3x3`` is
a pattern with options, one behind every colon.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...attention_types import ATTENTION_TYPES
from ...functional.patterns import Dense, Pattern, Radial, SlidingTile, VideoSparse
from ...integrations.schedule import Schedule
from ...patterns.radial import RadialRule
from ...registry import PRECISIONS
from .. import UsageError
from ..options import share, sizes

NAMED = tuple(ATTENTION_TYPES)
PATTERNS = ("sta", "vsa", "radial")


@dataclass(frozen=True)
class Kind:
    """One attention type.

    Args:
        text: as it was asked for. named: the attention type of dense calls.
        pattern: of sparse calls; ``Dense()`` where there are none. precision: of sparse calls.
        schedule: which layers and steps stay dense.
    """

    text: str
    named: str
    pattern: Pattern
    schedule: Schedule
    precision: str = "native"

    @property
    def label(self) -> str:
        """The type in the name of a file: letters, digits and ``_ . = -``."""
        return re.sub(r"[^\w.=]+", "-", self.text)

    @property
    def is_sparse(self) -> bool:
        return not isinstance(self.pattern, Dense)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number from 0")
    return int(text)


def _steps(text: str) -> int | float:
    return _whole(text) if text.isdecimal() else share(text)


def _precision(text: str) -> str:
    if text not in PRECISIONS:
        raise ValueError(f"{text!r} is none of {', '.join(PRECISIONS)}")
    return text


_TRIPLE = sizes("TxHxW")
_SCHEDULE: dict[str, Callable[[str], Any]] = {
    "dense_layers": _whole, "dense_first_steps": _steps, "dense_last_steps": _steps,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "sta": {"window": _TRIPLE, "tile": _TRIPLE},
    "vsa": {"top_k_ratio": share, "top_k": _whole, "tile": _TRIPLE},
    "radial": {"decay_factor": float, "block_size": _whole},
}


def parse_kind(text: str) -> Kind:
    """The attention type that ``text`` means.

    Raises:
        UsageError: there is no such type or option, or a value does not fit; the message lists what
            there is.
    """
    name, *words = text.split(":")
    if name in ATTENTION_TYPES:
        if words:
            raise UsageError(f"attention type {name!r} takes no options, got {':'.join(words)!r}")
        return Kind(text, name, Dense(), Schedule())
    if name not in PATTERNS:
        raise UsageError(
            f"attention type {name!r} is none of {', '.join((*NAMED, *PATTERNS))}; a pattern takes "
            "options, as in sta:window=3x3x3"
        )
    known = OPTIONS[name] | _SCHEDULE | {"precision": _precision}
    values: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in known:
            raise UsageError(f"{name} has no option {key!r}, only {', '.join(known)}")
        try:
            values[key] = known[key](value)
        except Exception as error:  # of argparse's converters, of int and of float
            raise UsageError(f"{name}: {key}={value}: {error}") from error
    precision = values.pop("precision", "native")
    schedule = Schedule(**{key: values.pop(key) for key in _SCHEDULE if key in values})
    try:
        pattern = _pattern(name, values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"attention type {text!r}: {error}") from error
    return Kind(text, "sdpa", pattern, schedule, precision)


def _pattern(name: str, values: dict[str, Any]) -> Pattern:
    if name == "sta":
        return SlidingTile(**{"window": (3, 3, 3)} | values)
    if name == "vsa":
        return VideoSparse(**values if values.keys() & {"top_k", "top_k_ratio"} else
                           {"top_k_ratio": 0.125} | values)  # fmt: skip
    decay = values.pop("decay_factor", None)
    rule = None if decay is None else RadialRule(decay_factor=decay)
    return Radial(rule, **values)
