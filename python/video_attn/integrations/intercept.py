"""Answers the one attention call inside a module of a model with a function of ours.

An attention module of diffusers projects, normalises and rotates in its own way and then calls
``torch.nn.functional.scaled_dot_product_attention``, or diffusers' ``dispatch_attention_fn``. Only
that call is to be answered differently; everything else is to stay what it is.

:func:`replace_processor` does so for the processors of diffusers. It sets a processor that shares
all attributes of the one before and runs the same code; in the globals that this code sees, two
names are ours. No module is changed, nothing holds for the process or the thread, and
``torch.compile`` traces it like any function. :func:`call_with_attention` does so for any function,
by a mode of the running thread.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention_call import AttentionCall
from .fused_norms import FusedNorms

Result = TypeVar("Result")


Attend = Callable[[AttentionCall], Tensor]


def call_with_attention(
    attend: Attend, function: Callable[..., Result], *arguments: Any, **keywords: Any
) -> Result:
    """``function(*arguments, **keywords)``, whose ``scaled_dot_product_attention`` is ``attend``.

    In this thread and this call alone; what ``attend`` itself calls is torch's own. It is no error
    when the function never comes to attention.
    """
    with _ReplacedSdpa(attend):
        return function(*arguments, **keywords)


def call_that_attends(
    attend: Attend, function: Callable[..., Result], *arguments: Any, **keywords: Any
) -> Result:
    """:func:`call_with_attention` for a function that must come to attention.

    Raises:
        RuntimeError: it does not, so that its attention was not replaced.
    """
    reached = []

    def noted(call: AttentionCall) -> Tensor:
        reached.append(True)
        return attend(call)

    result = call_with_attention(noted, function, *arguments, **keywords)
    if not reached:
        raise RuntimeError(
            f"{getattr(function, '__name__', type(function).__name__)} did not call "
            "scaled_dot_product_attention, so its attention was not replaced; it needs a processor "
            "that does"
        )
    return result


class _ReplacedSdpa(TorchFunctionMode):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _answer(self.attend, None, *args, **kwargs)


# -- processors of diffusers -----------------------------------------------------------------------


def replace_processor(
    module: Any,
    attend: Attend,
    gate: Callable[[], Any] | None = None,
    *,
    without_mask: bool = False,
    norms: FusedNorms | None = None,
) -> ReplacedProcessor:
    """Gives an attention module of diffusers a processor whose attention is ``attend``.

    ``_attention_backend``, ``_parallel_config`` and all else that is set on the processor, before
    or after, is seen by both processors. A processor that skips attention in a call skips
    ``attend`` too.

    Args:
        module: the attention module. attend: answers its calls.
        gate: gives the projection of the hidden states to ``AttentionCall.gate``, or None, at each
            call; default the module's ``to_gate_compress`` of one value per channel of a query.
        without_mask: the mask that the module is given says nothing that ``attend`` does not know.
            It then stays without memory (some processors make S x S of it), and is None in the
            call.
        norms: puts norms and rotary positions of q and k off, where it can, so that the call
            has them in ``AttentionCall.deferred``.

    Returns:
        The processor; its ``undo()`` puts the one before back.

    Raises:
        TypeError: the module has no processor, or its attention is replaced already.
    """
    before = getattr(module, "processor", None)
    if before is None or isinstance(before, ReplacedProcessor):
        raise TypeError(
            f"module must have an attention processor of its own, got {type(module).__name__} with "
            f"{type(before).__name__}"
        )
    own: Any = type(before)
    kind = _replaced_class(own)
    processor = object.__new__(kind)
    attributes = (
        ("__dict__", before.__dict__), ("module", module), ("before", before), ("attend", attend),
        ("gate", gate), ("without_mask", without_mask), ("norms", norms),
    )  # fmt: skip
    for name, value in attributes:  # past nn.Module, which would register a module as a child
        object.__setattr__(processor, name, value)
    # Not set_processor(): it would take a processor with weights for one that is thrown away.
    module.__dict__["processor"] = processor
    return processor


class ReplacedProcessor:
    """What :func:`replace_processor` sets: the processor before, with other attention.

    Attributes:
        module, before, attend, gate: the attention module, its own processor, and as given.
    """

    __slots__ = ()
    module: Any
    before: Any
    attend: Attend
    gate: Callable[[], Any] | None
    without_mask: bool
    norms: FusedNorms | None

    @property
    def is_set(self) -> bool:
        """Whether the module still has this processor."""
        return self.module.processor is self

    def undo(self) -> None:
        """Puts the processor before back, unless somebody has set another one meanwhile."""
        if self.is_set:
            del self.module.__dict__["processor"]
            if "processor" not in self.module._modules:
                self.module.__dict__["processor"] = self.before

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "attention is applied to this model: call undo() on its handle before it is copied or "
            "pickled, and apply again afterwards (save_pretrained needs no undo)"
        )


class _Traced:
    """The processor that torch.compile is tracing: compiled code keeps nothing of it."""

    processor: Any = None


_traced = _Traced()
_running: ContextVar[Any] = ContextVar("video_attn_processor", default=None)


@functools.cache
def _replaced_class(kind: Any) -> Any:
    """A class of processors that run the code of ``kind`` and answer its attention."""
    original = kind.__call__
    inner = rebound(original)

    def call(self: Any, attn: Any, *arguments: Any, **keywords: Any) -> Any:
        mask = keywords.get("attention_mask")
        if self.without_mask and mask is not None:
            keywords["attention_mask"] = torch.empty_like(mask, device="meta")
        if inner is None:
            return call_that_attends(self.attend, original, self, attn, *arguments, **keywords)
        gate, deferred = _gate(self, attn, arguments, keywords), None
        if self.norms is not None and self._parallel_config is None:
            put_off = self.norms.defer(arguments, keywords)
            if put_off is not None:
                attn = self.norms.without_norms
                arguments, keywords, deferred = put_off
        if torch.compiler.is_compiling():
            _traced.processor = self, gate, deferred
            out = inner(self, attn, *arguments, **keywords)
            _traced.processor = None
            return out
        token = _running.set((self, gate, deferred))
        try:
            return inner(self, attn, *arguments, **keywords)
        finally:
            _running.reset(token)

    # The attention modules of diffusers look at the parameters of the processor.
    call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    slots = "module", "before", "attend", "gate", "without_mask", "norms"
    names = {"__slots__": slots, "__call__": call}
    return type(kind.__name__, (ReplacedProcessor, kind), names)


@functools.cache
def rebound(function: Any) -> Any:
    """The same code with our answers under the names of attention; None where it uses none of them.

    What it returns is for processors and for :func:`call_rebound`.
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    names = dict(function.__globals__)
    names.pop("__name__", None)  # so that torch.compile looks here, and not in the module
    replaced = {
        "dispatch_attention_fn": _answer_dispatch,
        "scaled_dot_product_attention": _answer_sdpa,
    }
    for name, answer in replaced.items():
        if name in names:
            names[name] = answer
    if names.get("F") is F and "scaled_dot_product_attention" in code.co_names:
        names["F"] = _functional()
    if not any(names.get(x) is not function.__globals__.get(x) for x in code.co_names):
        return None
    copy = types.FunctionType(
        code, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _Answering:
    """What the names in :func:`rebound` code ask, where there is no processor."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend


def call_rebound(attend: Attend, function: Any, *arguments: Any, **keywords: Any) -> Any:
    """:func:`call_with_attention` for code that torch.compile is tracing, which may not be able to
    trace a mode; ``function`` is what :func:`rebound` gave.
    """
    before = _traced.processor
    _traced.processor = _Answering(attend), None, None
    out = function(*arguments, **keywords)
    _traced.processor = before
    return out


@functools.cache
def _functional() -> types.ModuleType:
    """``torch.nn.functional`` with our ``scaled_dot_product_attention``."""
    module = types.ModuleType("torch.nn.functional")
    module.__dict__.update(F.__dict__)
    module.__dict__["scaled_dot_product_attention"] = _answer_sdpa
    return module


def _answer_sdpa(*arguments: Any, **keywords: Any) -> Tensor:
    asking = _traced.processor if torch.compiler.is_compiling() else _running.get()
    processor, gate, _ = asking
    return _answer(processor.attend, gate, *arguments, **keywords)


def _answer_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    if attention_kwargs:
        raise ValueError(f"attention_kwargs must be empty, got {sorted(attention_kwargs)}")
    asking = _traced.processor if torch.compiler.is_compiling() else _running.get()
    processor, gate, deferred = asking
    attn_mask = None if processor.without_mask else attn_mask
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    call = AttentionCall(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
        enable_gqa=enable_gqa,
    )  # fmt: skip
    call.gate, call.dispatched, call.deferred = gate, True, deferred
    call.backend, call.parallel_config = backend, parallel_config
    _autocast(call)
    return processor.attend(call).transpose(1, 2)


def _answer(attend: Attend, gate: Tensor | None, *arguments: Any, **keywords: Any) -> Tensor:
    """``arguments`` and ``keywords`` are those of torch's attention."""
    call = AttentionCall(*arguments, **keywords)
    call.gate = gate
    _autocast(call)
    return attend(call)


def _autocast(call: AttentionCall) -> None:
    """Under autocast, what torch's attention does with its inputs: one dtype for all."""
    device = call.query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        call.query, call.key, call.value = (
            x.to(dtype) if x.dtype != torch.float64 else x
            for x in (call.query, call.key, call.value)
        )


def _gate(
    processor: ReplacedProcessor, attn: Any, arguments: tuple, keywords: dict[str, Any]
) -> Tensor | None:
    """The weights of a coarse branch, [B, H, tokens, D], from a module that has learned them."""
    if processor.gate is not None:
        project = processor.gate()
    else:
        project = getattr(attn, "to_gate_compress", None)
        if getattr(project, "out_features", None) != getattr(attn.to_q, "out_features", None):
            return None
    if project is None:
        return None
    hidden_states = arguments[0] if arguments else keywords["hidden_states"]
    return project(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
