"""Tensors of :mod:`.static_cache` in compiled code that serves many sizes.

A model is compiled once and then called with videos of other sizes: ``torch.compile`` leaves the
sizes open, as symbols. A table that depends on them can be no constant of the graph. It is the
result of an operator instead, ``video_attn::table``, which is given the sizes at every run, looks
the table up, and returns a copy, because compiled code may write into what an operator returned.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from .compiler import constant_result

Lookup = Callable[..., tuple[Tensor, ...]]
Size = tuple[int, ...]
Shapes = Callable[..., Sequence[Size]]

library = torch.library.Library("video_attn", "FRAGMENT")
library.define(
    "table(str name, str constants, SymInt[] sizes, ScalarType dtype, Device device) -> Tensor[]"
)

_OPEN = "?"  # no text of a key
_tables: dict[str, tuple[Lookup, Shapes]] = {}


def register_table(name: str, lookup: Lookup, shapes: Shapes) -> None:
    """Makes a table known to the operator.

    Args:
        lookup: ``(*key)`` to the tensors. The last value of a key is their device.
        shapes: ``(*key)`` to the shape of each tensor, where numbers of the key may be symbols. A
            shape may be larger than what ``lookup`` returns: then a dimension of size 1 is
            repeated, another one filled up with zeros.
    """
    _tables[name] = lookup, shapes


def is_open(value: Any) -> bool:
    """Whether a number, or one of a tuple of them, is a symbol left open by ``torch.compile``."""
    if isinstance(value, tuple):
        return any(map(is_open, value))
    if not torch.compiler.is_compiling():
        return isinstance(value, torch.SymInt)
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return isinstance(value, int) and not has_static_value(value)


def open_table(name: str, key: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors of a table for a ``key`` with open sizes."""
    sizes: list[int] = []
    constants = _without_sizes(key[:-1], sizes)
    text = _as_text(constants)
    return tuple(torch.ops.video_attn.table(name, text, sizes, dtype, key[-1]))


def _without_sizes(value: Any, sizes: list[int]) -> Any:
    """``value`` with a mark for each of its open numbers, which are added to ``sizes``."""
    if isinstance(value, tuple):
        return tuple([_without_sizes(x, sizes) for x in value])
    if not is_open(value):  # a symbol that has one value only becomes a number
        return index(value) if type(value) is int else value
    sizes.append(value)
    return _OPEN


@constant_result
def _as_text(constants: tuple[Any, ...]) -> str:
    return repr(constants)


@lru_cache(maxsize=1024)
def _of_text(text: str) -> Any:
    return ast.literal_eval(text)


def _with_sizes(value: Any, sizes: Iterator[int]) -> Any:
    if isinstance(value, tuple):
        return tuple([_with_sizes(x, sizes) for x in value])
    return next(sizes) if value == _OPEN else value


def _table(
    name: str, constants: str, sizes: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    lookup, shapes = _tables[name]
    key = (*_with_sizes(_of_text(constants), iter(sizes)), device)
    return [_copy(x, s) for x, s in zip(lookup(*key), shapes(*key), strict=True)]


def _table_fake(
    name: str, constants: str, sizes: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    key = (*_with_sizes(_of_text(constants), iter(sizes)), device)
    return [torch.empty(shape, dtype=dtype, device=device) for shape in _tables[name][1](*key)]


def _copy(x: Tensor, shape: Size) -> Tensor:
    if x.shape == shape:
        return x.clone()
    out = x.new_zeros(shape)
    out[tuple([slice(None if n == 1 else n) for n in x.shape])] = x
    return out


library.impl("table", _table, "CompositeExplicitAutograd")
torch.library.register_fake("video_attn::table", _table_fake, lib=library)
