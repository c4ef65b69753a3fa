"""Patterns on the dotted names of modules, and what to say where one matches nothing."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable

Pattern = str | Callable[[str], bool]
_SHOWN = 6


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a wildcard (fnmatch, case counts) or a callable takes ``name``.

    Raises:
        TypeError: ``pattern`` is neither, or the callable does not answer with a bool.
    """
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern)
    if not callable(pattern):
        raise TypeError(f"a pattern must be a wildcard or a callable, got {pattern!r}")
    answer = pattern(name)
    if not isinstance(answer, bool):
        raise TypeError(f"pattern {pattern!r} must return True or False, got {answer!r}")
    return answer


def near_names(pattern: Pattern, names: Iterable[str]) -> list[str]:
    """Names that ``pattern`` may have meant: the most alike first, one of each kind of module.

    Numbers count as one kind: "blocks.0.attn1" stands for all "blocks.*.attn1".
    """
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(kind_of(name), name)
    if not isinstance(pattern, str):
        return list(kinds)[:_SHOWN]
    return difflib.get_close_matches(pattern, kinds, n=_SHOWN, cutoff=0.0)


def kind_of(name: str) -> str:
    """Numbers as stars: "blocks.*.attn1" of "blocks.3.attn1"."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def no_match_message(pattern: Pattern, names: Iterable[str]) -> str:
    """The warning about a pattern that takes no attention module."""
    near = near_names(pattern, names)
    if not near:
        return f"pattern {pattern!r} matches nothing: the model has no attention modules"
    return (
        f"pattern {pattern!r} matches no attention module, so it changes nothing. Attention "
        f"modules here: {', '.join(map(repr, near))}"
    )
