"""Finds attention modules in any model, and says what is self-attention, by structure.

Equal lengths prove nothing: a video of 1,024 tokens beside 1,024 tokens of text is an ordinary
case. What proves self-attention is that queries, keys and values are projected from one tensor.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# How attention modules name their projections, (q, k, v) or one for all.
SPLIT_NAMES = (
    ("to_q", "to_k", "to_v"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("Wq", "Wk", "Wv"),
    ("q_linear", "k_linear", "v_linear"),
)
FUSED_NAMES = ("to_qkv", "qkv", "qkv_proj", "Wqkv", "in_proj", "c_attn", "query_key_value")
# Wrappers that put a word of theirs into the names of everything below them.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Projections(NamedTuple):
    """The modules that make q, k and v; the same one three times where they are fused."""

    query: nn.Module
    key: nn.Module
    value: nn.Module


def projections(module: nn.Module) -> Projections | None:
    """The projections of an attention module, or None where it has none that we know."""
    children = dict(module.named_children())
    for names in SPLIT_NAMES:
        found = [children.get(name) for name in names]
        if all(child is not None for child in found):
            return Projections(*found)  # type: ignore[arg-type]
    for name in FUSED_NAMES:
        child = children.get(name)
        if child is not None:
            return Projections(child, child, child)
    return None


def clean_name(name: str) -> str:
    """A dotted name without what torch.compile, FSDP and checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All attention modules of ``model`` by dotted name, in their order.

    Those are ``nn.MultiheadAttention``, modules with projections of q, k and v, and modules whose
    class name says attention and that contain no other. A model that is itself one has its class
    for a name, in lower case. A module that stands at several places has its first name.
    """
    from .module import original_class

    found: dict[str, nn.Module] = {}
    prefix = "module." if type(model).__name__.endswith("DataParallel") else ""
    for name, module in model.named_modules():
        if not _is_attention(module):
            continue
        name = clean_name(name.removeprefix(prefix))
        found[name or original_class(module).__name__.lower()] = module
    return found


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention) or projections(module) is not None:
        return True
    return _says_attention(module) and not any(
        isinstance(child, nn.MultiheadAttention)
        or projections(child) is not None
        or _says_attention(child)
        for child in _descendants(module)
    )


def _says_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name


def _descendants(module: nn.Module) -> Iterator[nn.Module]:
    modules = module.modules()
    next(modules)
    return modules


class ProjectedFrom:
    """What q, k and v were projected from in one forward: filled while it runs.

    Attributes:
        query, key, value: the inputs of the projections; None: not seen.
    """

    def __init__(self) -> None:
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def seen(self) -> bool:
        """Whether all three were."""
        return self.query is not None and self.key is not None and self.value is not None

    @property
    def one_tensor(self) -> bool:
        """Whether all three were made from the same tensor."""
        return self.query is self.key and self.key is self.value


class _Running(threading.local):
    """The module that this thread runs, if its projections are to be seen."""

    def __init__(self) -> None:
        self.seen: ProjectedFrom | None = None


class _Traced:
    """The same while torch.compile traces; compiled code keeps nothing of it."""

    seen: ProjectedFrom | None = None


_running, _traced = _Running(), _Traced()


@contextlib.contextmanager
def observed(seen: ProjectedFrom) -> Iterator[None]:
    """Inside of it, the projections of a watched module tell ``seen`` their inputs."""
    place = _place()
    before, place.seen = place.seen, seen
    try:
        yield
    finally:
        place.seen = before


def watch(module: nn.Module) -> None:
    """Makes the projections of ``module`` tell what they are given; once."""
    unwatch(module)
    parts = projections(module)
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, part in zip(("query", "key", "value"), parts or (), strict=False):
        names[part] = (*names.get(part, ()), name)
    for part, of_part in names.items():
        part.register_forward_pre_hook(functools.partial(_tell, of_part), with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Takes back :func:`watch`."""
    for part in module.modules():
        hooks = part._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if getattr(hook, "func", None) is _tell]:
            del hooks[key]
            part._forward_pre_hooks_with_kwargs.pop(key, None)


def _tell(names: tuple[str, ...], part: nn.Module, args: Any, kwargs: Any) -> None:
    seen = _place().seen
    if seen is None:
        return
    x = args[0] if args else kwargs.get("input")
    for name in names:
        if getattr(seen, name) is None:
            setattr(seen, name, x)


def _place() -> Any:
    return _traced if torch.compiler.is_compiling() else _running
