"""sparsify, and what switches, changes and undoes it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from .attend import attach_processor, check_processor
from .attributes import AttentionAttributes
from .config import DEFAULT, VSA_DEFAULT, given_attributes, merged, read_config, resolved
from .gates import GATE, find_gate_owner
from .matching import Pattern, matches, no_match_message
from .module import SparseAttentionModule, _switched, convert, revert
from .roots import Root, roots_of
from .state import ModuleState
from .structure import watch

logger = logging.getLogger("video_attn")


def sparsify(
    model: Any,
    config: Any = VSA_DEFAULT,
    forward_loop: Callable[..., Any] | None = None,
) -> Any:
    """Gives the attention modules that ``config`` names another attention. In place.

    ::

        model = sparsify(model, {"sparse_cfg": {
            "*.attn1": {"method": "vsa", "top_k_ratio": 0.3},
            "default": {"enable": False},
        }})

    Nothing of ``model`` changes but the classes of its attention modules: parameters, names and
    ``state_dict`` stay, and :func:`unsparsify` gives the classes back. A second call replaces the
    first. Where a call cannot be served, it raises; nothing turns dense in silence.

    Args:
        model: any ``nn.Module``, or a diffusers pipeline, whose transformers are then meant.
        config: see :mod:`video_attn.sparsity.config`.
        forward_loop: taken so that calls written for the original work; no method needs
            calibration, so it is not called.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; ``model`` is untouched then.
        RuntimeError: ``apply()`` holds an attention of this model already.
    """
    config = read_config(config)
    if forward_loop is not None and not callable(forward_loop):
        raise TypeError(f"forward_loop must be callable or None, got {forward_loop!r}")
    roots = roots_of(model)
    patterns = [pattern for pattern in config.sparse_cfg if pattern != DEFAULT]
    taken: dict[Pattern, int] = dict.fromkeys(patterns, 0)
    names = [name for root in roots for name in root.modules]
    plan = []
    for root in roots:
        for name, module in root.modules.items():
            hits = [pattern for pattern in patterns if matches(pattern, name)]
            for pattern in hits:
                taken[pattern] += 1
            given, attributes = config.attributes_of([config.sparse_cfg[p] for p in hits])
            plan.append((root, module, ModuleState(name, given, attributes)))
    for pattern, count in taken.items():
        if count == 0:
            warnings.warn(no_match_message(pattern, names), stacklevel=2)
    _carry_out(plan)
    return model


def _carry_out(plan: list[tuple[Root, nn.Module, ModuleState]]) -> None:
    """Converts the modules, after the last check that can fail.

    Raises:
        ValueError: a schedule of more layers than there are. RuntimeError: ``apply()`` holds an
            attention of this model already.
    """
    for root, module, state in plan:
        root.describe(module, state)
        root.check(state)
        if state.family and state.other_role is None:
            check_processor(module, state)
    for root, module, state in plan:
        if isinstance(module, SparseAttentionModule):
            state.added_gate = module._sparse_attention.added_gate
        state.gate_owner = None if state.other_role else find_gate_owner(module, root.block(module))
        convert(module, state)
        if not state.family:
            watch(module)
        elif state.other_role is None:
            attach_processor(module, state)
    for root in dict.fromkeys(root for root, _, _ in plan):
        root.attach()
    _log_gates([state for _, _, state in plan])


def _log_gates(states: list[ModuleState]) -> None:
    """Says once what "auto" does here."""
    without = [
        state
        for state in states
        if state.attributes is not None
        and state.enabled
        and getattr(state.attributes, "gate", None) == "auto"
        and state.gate_owner is None
        and state.other_role is None
    ]
    if without:
        logger.info(
            "%d modules have no %s: their coarse branch is left out, so that top_k_ratio 1 is "
            "dense attention; gate='sum' adds it with weight 1, add_gates() makes it trainable",
            len(without), GATE,
        )  # fmt: skip


def unsparsify(model: Any) -> Any:
    """Takes sparsification out: every module has its class back, and gates that
    :func:`~video_attn.sparsity.add_gates` made are gone. Returns ``model``.

    Gates that the model had of itself stay. Nothing happens to a model that is not sparsified.

    Raises:
        RuntimeError: something else has changed the class of a module since, as FSDP2 does with a
            module that is sharded by itself.
    """
    for root in roots_of(model):
        for module in root.modules.values():
            if isinstance(module, SparseAttentionModule):
                if module._sparse_attention.added_gate:
                    delattr(module, GATE)
                revert(module)
        root.detach()
    return model


def get_named_sparse_attention_modules(model: Any) -> list[tuple[str, SparseAttentionModule]]:
    """(dotted name, module) of all sparsified modules, enabled or not, in their order."""
    return list(_sparse_modules(model))


def is_attn_sparsified(model: Any) -> bool:
    """Whether :func:`sparsify` was applied to ``model``."""
    return any(True for _ in _sparse_modules(model))


def enable_sparse_attention(model: Any, wildcard_or_filter: Pattern = "*") -> None:
    """Enables the modules that match; those without a method are named in a warning."""
    nothing = []
    for name, module in _matching(model, wildcard_or_filter):
        if module._sparse_attention.attributes is None:
            nothing.append(name)
        else:
            module.enable()
    if nothing:
        warnings.warn(
            f"{len(nothing)} modules have no method and stay dense, {nothing[0]!r} among them: "
            "give them one with set_sparse_attention_attribute",
            stacklevel=2,
        )


def disable_sparse_attention(model: Any, wildcard_or_filter: Pattern = "*") -> None:
    """Disables the modules that match: they run dense, exactly as before."""
    for _, module in _matching(model, wildcard_or_filter):
        module.disable()


def set_sparse_attention_attribute(
    model: Any,
    wildcard_or_filter: Pattern,
    attribute_cfg: Mapping[str, Any] | AttentionAttributes,
) -> None:
    """Overrides attributes of the modules that match: the keys that are given, and no others.

    Raises:
        ValueError: an unknown key, or a value that does not fit; nothing is changed then.
    """
    given = given_attributes(attribute_cfg)
    modules = list(_matching(model, wildcard_or_filter))
    for _, module in modules:  # all are checked before one is changed
        resolved(merged(module._sparse_attention.given, given))
    for _, module in modules:
        module._sparse_attention.override(given)
        _switched(module)


def _sparse_modules(model: Any) -> Iterator[tuple[str, SparseAttentionModule]]:
    for root in roots_of(model):
        for name, module in root.modules.items():
            if isinstance(module, SparseAttentionModule):
                yield name, module


def _matching(model: Any, pattern: Pattern) -> Iterator[tuple[str, SparseAttentionModule]]:
    modules = get_named_sparse_attention_modules(model)
    if not modules:
        raise ValueError("model is not sparsified: call sparsify(model, config) first")
    found = [(name, module) for name, module in modules if matches(pattern, name)]
    if not found:
        warnings.warn(no_match_message(pattern, [name for name, _ in modules]), stacklevel=3)
    return iter(found)
