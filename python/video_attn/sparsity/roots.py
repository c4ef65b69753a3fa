"""Roots: the parts of a model within which one video is attended to.

A root is a transformer that we know (its family says which modules are video self-attention and
how the tokens of a call lie), or any other model as it is (then the person says so). While a root
runs, what its call is about is kept under it, for the modules inside.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..functional.video_tokens import VideoTokens
from ..integrations.context import call, call_state, enter_call, leave_call
from ..integrations.models import Family, family_of
from ..integrations.steps import TRANSFORMERS, denoising_step, unwrapped
from ..layout import Triple
from .attributes import read_triple
from .module import SparseAttentionModule
from .state import ModuleState
from .structure import attention_modules

_HOOKS = "_video_attn_sparse_hooks"


@dataclass(frozen=True)
class CallInfo:
    """What a call of a root is about.

    Attributes:
        tokens: how its sequence lies.
        step: (index, count) of the denoising step; None: not known.
        said: by a person, with :func:`video_shape`, and not found by a family.
        masks_text, gathers_text: see :class:`~video_attn.integrations.models.Family`.
    """

    tokens: VideoTokens
    step: tuple[int, int] | None = None
    said: bool = False
    masks_text: bool = False
    gathers_text: bool = False


class Root:
    """A transformer of a known family, or a whole model of none.

    Attributes:
        owner: the module under which the state of a call is kept.
        family: None for a model that we do not know.
        modules: its attention modules, by dotted name in the model that was given.
    """

    def __init__(self, owner: nn.Module, family: Family | None, pipe: Any = None) -> None:
        self.owner, self.family, self.pipe = owner, family, pipe
        self.modules: dict[str, nn.Module] = {}
        self._layers = (
            None
            if family is None
            else {id(x.module): x.layer for x in family.attention_layers(owner)}
        )

    def block(self, module: nn.Module) -> nn.Module | None:
        """The module that holds ``module``."""
        return self._parents.get(id(module))

    @functools.cached_property
    def _parents(self) -> dict[int, nn.Module]:
        return {id(child): parent for parent in self.owner.modules() for child in parent.children()}

    def describe(self, module: nn.Module, state: ModuleState) -> None:
        """Tells ``state`` where its module stands: root, layer, role."""
        state.owner = self.owner
        state.family = self.family is not None
        if self._layers is None:
            state.index = [id(x) for x in self.modules.values()].index(id(module))
        elif id(module) in self._layers:
            state.index = self._layers[id(module)]
        else:
            state.other_role = "not video self-attention"

    def check(self, state: ModuleState) -> None:
        """Raises ValueError where the schedule has more dense layers than there are."""
        layers = len(self.modules) if self._layers is None else 1 + max(self._layers.values())
        dense = 0 if state.attributes is None else state.attributes.schedule.dense_layers
        if dense > layers:
            raise ValueError(
                f"schedule.dense_layers of {state.name!r} must be at most {layers}, got {dense}"
            )

    def attach(self) -> None:
        """Makes a transformer keep what its calls are about; of a plain model a person says it."""
        if self.family is None:
            return
        self.detach()  # a second sparsify may know the pipeline, which the first did not
        before = functools.partial(_before_call, _Weakly(self.pipe))
        self.owner.__dict__[_HOOKS] = (
            self.owner.register_forward_pre_hook(before, with_kwargs=True),
            self.owner.register_forward_hook(_after_call, always_call=True),
        )

    def detach(self) -> None:
        """Takes out what :meth:`attach` put in."""
        for handle in self.owner.__dict__.pop(_HOOKS, ()):
            handle.remove()
        checkpoint = getattr(self.owner, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _Checkpoint):
            _set_checkpoint(self.owner, checkpoint.function)


def roots_of(model: Any) -> list[Root]:
    """The roots of a model, or of the transformers of a pipeline, with their attention modules.

    Raises:
        TypeError: neither a module nor a pipeline with a transformer.
    """
    roots: dict[int, Root] = {}
    for prefix, part in _parts(model):
        families = {id(x): (x, f) for x in part.modules() if (f := family_of(x)) is not None}
        owner_of = {id(below): x for x, _ in families.values() for below in x.modules()}
        for name, module in attention_modules(part).items():
            owner = owner_of.get(id(module), part)
            if id(owner) not in roots:
                family = families[id(owner)][1] if id(owner) in families else None
                roots[id(owner)] = Root(owner, family, model if prefix else None)
            roots[id(owner)].modules[prefix + name] = module
    return list(roots.values())


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """(prefix of names, module) of what is to be sparsified."""
    if isinstance(model, nn.Module):
        yield "", unwrapped(model)
        return
    found = [(name, unwrapped(getattr(model, name, None))) for name in TRANSFORMERS]
    found = [(f"{name}.", part) for name, part in found if isinstance(part, nn.Module)]
    if not found:
        raise TypeError(
            "model must be a torch module, or a diffusers pipeline with a transformer, got "
            f"{type(model).__name__}"
        )
    yield from found


@contextlib.contextmanager
def video_shape(
    model: Any,
    shape: Sequence[int],
    *,
    text_length: int = 0,
    text_first: bool = False,
    step: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Says how the video lies in the calls of ``model`` inside a ``with``; in this thread.

    ::

        with video_shape(model, (16, 28, 48)):
            out = model(latents)

    The models of diffusers that we know need none: they are asked themselves. A backward pass that
    computes activations again (gradient checkpointing) is outside of the ``with``: there, say the
    shape in the configuration, or with ``set_video_shape``.

    Args:
        model: sparsified.
        shape: tokens (T, H, W) of the video after patchifying, in raster order.
        text_length: other tokens of the same sequence (text, conditions, keyframes); they see
            everything and are seen by everything.
        text_first: they stand before the video, not after it.
        step: (index from 0, count) of the denoising step, which a schedule may ask for.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """
    tokens = VideoTokens(read_triple(shape, "shape"), text_length, text_first)
    if step is not None and not (len(step) == 2 and 0 <= step[0] < step[1]):
        raise ValueError(f"step must be (index from 0, count), got {step!r}")
    info = CallInfo(tokens, step, said=True)
    with contextlib.ExitStack() as stack:
        for root in roots_of(model):
            stack.enter_context(call(root.owner, info))
        yield


# -- hooks of a transformer ------------------------------------------------------------------------


class _Entered(threading.local):
    """What the running calls of this thread have entered, the innermost last."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []


_entered = _Entered()
_NOTHING = object()


class _Weakly:
    """Holds a pipeline without keeping it, or being copied with it."""

    def __init__(self, thing: Any) -> None:
        self._reference: Any = None
        if thing is not None:
            try:
                self._reference = weakref.ref(thing)
            except TypeError:  # of a class with slots
                self._reference = lambda: thing

    def __call__(self) -> Any:
        return None if self._reference is None else self._reference()

    def __deepcopy__(self, memo: Any) -> _Weakly:
        return self

    def __reduce__(self) -> Any:
        return _Weakly, (None,)


@torch.compiler.disable
def _before_call(pipe: _Weakly, transformer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    family: Any = family_of(transformer)
    _entered.tokens.append(_NOTHING)  # the hook after it comes, even if this one raises
    known = call_state(transformer)
    inputs = family.bind(args, kwargs)
    if known is not None and known.said:
        info = known
    else:
        step = _step(family, transformer, inputs["timestep"], pipe)
        info = CallInfo(
            family.tokens(transformer, inputs), step,
            masks_text=family.masks_text, gathers_text=family.gathers_text,
        )  # fmt: skip
    _carry_through_checkpoints(transformer)
    _entered.tokens[-1] = enter_call(transformer, info)


@torch.compiler.disable
def _after_call(transformer: nn.Module, args: Any, output: Any) -> None:
    token = _entered.tokens.pop()
    if token is not _NOTHING:
        leave_call(token)


def _step(family: Family, transformer: Any, timestep: Any, pipe: _Weakly) -> tuple[int, int] | None:
    layers = [x.module for x in family.attention_layers(transformer)]
    if not any(_needs_step(module) for module in layers):
        return None
    return denoising_step(transformer, timestep, pipe=pipe())


def _needs_step(module: Any) -> bool:
    if not isinstance(module, SparseAttentionModule):
        return False
    attributes = module._sparse_attention.attributes
    return attributes is not None and attributes.schedule.needs_step


# -- gradient checkpointing ------------------------------------------------------------------------


class _Checkpoint:
    """A transformer's checkpointing function, that computes again within the call that was.

    The second computation of a block runs in the backward pass, when the transformer has returned.
    """

    def __init__(self, function: Any, transformer: nn.Module) -> None:
        self.function, self.transformer = function, transformer

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        info = call_state(self.transformer)

        def again(*inputs: Any, **keywords: Any) -> Any:
            with call(self.transformer, info):
                return block(*inputs, **keywords)

        return self.function(again, *args, **kwargs)


def _carry_through_checkpoints(transformer: Any) -> None:
    function = getattr(transformer, "_gradient_checkpointing_func", None)
    if function is not None and not isinstance(function, _Checkpoint):
        _set_checkpoint(transformer, _Checkpoint(function, transformer))


def _set_checkpoint(transformer: Any, function: Any) -> None:
    transformer._gradient_checkpointing_func = function


def grid_text(shape: Triple) -> str:
    """A shape and its tokens: (16, 28, 48), 21504 tokens."""
    return f"{shape}, {math.prod(shape)} tokens"


__all__ = ["CallInfo", "Root", "grid_text", "roots_of", "video_shape"]
