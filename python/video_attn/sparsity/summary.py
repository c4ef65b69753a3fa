"""A table of what every module does."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ..layout import VideoLayout
from ..patterns.video_sparse import kept_blocks
from .conversion import get_named_sparse_attention_modules
from .matching import kind_of
from .state import ModuleState

if TYPE_CHECKING:
    from rich.console import Console


def print_sparse_attention_summary(model: Any, console: Console | None = None) -> None:
    """Prints "Sparse attention: n/m modules enabled", and a table with a line per group of modules
    that are alike: method, tile, kept share, gate, grid of the last call, density, sparse and dense
    calls, why dense.

    Density is measured where ``collect_stats`` is on; otherwise it is what the pattern keeps of the
    last grid, marked with ~.
    """
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise ImportError(
            "the summary is a table of rich: pip install 'video-attn[cli]'"
        ) from error
    if console is None:  # a file has no width that a table must fit
        console = Console(width=None if sys.stdout.isatty() else 160)
    modules = get_named_sparse_attention_modules(model)
    if not modules:
        console.print("Sparse attention: the model has no sparsified modules")
        return
    enabled = sum(module.is_enabled for _, module in modules)
    others = sum(m.is_enabled and m._sparse_attention.other_role is not None for _, m in modules)
    note = f", {others} of them dense by what they are" if others else ""
    line = f"Sparse attention: {enabled}/{len(modules)} modules enabled{note}"
    console.print(line, highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, ...], list[ModuleState]] = {}
    for name, module in modules:
        state = module._sparse_attention
        groups.setdefault((kind_of(name), *_row(state)), []).append(state)
    for (kind, *row), states in groups.items():
        label = kind if len(states) == 1 else f"{kind} ({len(states)})"
        table.add_row(label, *row, *_counts(states))
    console.print(table)


_COLUMNS = (
    "modules", "method", "tile", "kept", "gate", "grid", "density", "sparse", "dense", "why dense",
)  # fmt: skip


def _row(state: ModuleState) -> tuple[str, ...]:
    attributes = state.attributes
    if attributes is None or not state.enabled:
        return ("off" if attributes is None else f"{attributes.method}, off", "", "", "", "")
    tile = getattr(attributes, "block_size_3d", None)
    gate = getattr(attributes, "gate", "")
    trained = state.gate_owner is not None and gate in ("auto", "sum")
    return (
        attributes.method,
        "" if tile is None else _sizes(tile),
        _kept(attributes),
        "trained" if trained else gate.replace("auto", "none"),
        "" if state.last_grid is None else _sizes(state.last_grid),
    )


def _kept(attributes: Any) -> str:
    if attributes.method == "vsa":
        if attributes.top_k is not None:
            return f"{attributes.top_k} tiles"
        return f"{attributes.top_k_ratio:g}"
    if attributes.method == "sta":
        return f"{_sizes(attributes.window)} tiles"
    return ""


def _counts(states: list[ModuleState]) -> tuple[str, ...]:
    measured = [d for state in states if (d := state.mean_density()) is not None]
    expected = [d for state in states if (d := _expected_density(state)) is not None]
    density = ""
    if measured:
        density = f"{sum(measured) / len(measured):.3f}"
    elif expected:
        density = f"~{sum(expected) / len(expected):.3f}"
    reasons = dict.fromkeys(
        reason
        for state in states
        for reason in (state.dense_calls or ([state.other_role] if state.other_role else []))
    )
    dense = sum(sum(state.dense_calls.values()) for state in states)
    return (
        density,
        str(sum(state.sparse_calls for state in states)),
        str(dense),
        "; ".join(reason for reason in reasons if reason),
    )


def _expected_density(state: ModuleState) -> float | None:
    attributes: Any = state.attributes
    if attributes is None or state.last_grid is None or attributes.method != "vsa":
        return None
    tiles = VideoLayout(state.last_grid, attributes.block_size_3d).num_tiles
    kept = attributes.top_k or kept_blocks(attributes.top_k_ratio, tiles)
    return min(kept, tiles) / tiles


def _sizes(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))
