"""What runs in a sparsified module: its own forward, with another attention inside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.video_tokens import VideoTokens
from ..integrations.attention_call import AttentionCall
from ..integrations.context import call_state
from ..integrations.intercept import (
    ReplacedProcessor,
    call_rebound,
    call_with_attention,
    replace_processor,
)
from .gates import GATE
from .masks import UnsupportedError, valid_text
from .methods import measured
from .roots import CallInfo, grid_text
from .state import ModuleState
from .structure import ProjectedFrom, observed

Forward = Callable[..., Any]
CROSS = "cross-attention"


# -- around the forward of a module ----------------------------------------------------------------


def run(
    module: Any,
    state: ModuleState,
    forward: Forward,
    args: Any,
    kwargs: dict[str, Any],
    traced: Forward | None = None,
) -> Any:
    """``forward(module, *args, **kwargs)`` with the attention that ``state`` says; ``traced``: what
    :func:`rebound` made of ``forward``.
    """
    if not state.enabled:
        return forward(module, *args, **kwargs)
    if state.other_role is not None:
        state.count_dense(state.other_role)
        return forward(module, *args, **kwargs)
    if isinstance(module, nn.MultiheadAttention):
        from .multihead import run_multihead

        return run_multihead(module, state, forward, args, kwargs)
    if state.family:
        return _run_processor(module, state, forward, args, kwargs)
    return _run_any(module, state, forward, args, kwargs, traced)


def _run_processor(
    module: Any, state: ModuleState, forward: Forward, args: Any, kwargs: dict[str, Any]
) -> Any:
    """A module of a known transformer of diffusers: its processor asks us for attention."""
    if not isinstance(module.processor, ReplacedProcessor):  # set anew since, or a copy's
        attach_processor(module, state)
    return forward(module, *args, **kwargs)


def attach_processor(module: Any, state: ModuleState) -> None:
    """Makes the processor of a known module ask us."""
    detach_processor(module)
    check_processor(module, state)
    state.bind(replace_processor(module, _ProcessorAttention(state), lambda: gate_module(state)))


def check_processor(module: Any, state: ModuleState) -> None:
    """Raises RuntimeError where the processor asks another for its attention already."""
    processor = module.processor
    if isinstance(processor, ReplacedProcessor) and not isinstance(
        processor.attend, _ProcessorAttention
    ):
        raise RuntimeError(
            f"the attention of {state.name!r} is replaced already, by apply(): call undo() on its "
            "handle first"
        )


def detach_processor(module: Any) -> None:
    """Puts the module's own processor back."""
    processor = getattr(module, "processor", None)
    if isinstance(processor, ReplacedProcessor) and isinstance(
        processor.attend, _ProcessorAttention
    ):
        processor.undo()


class _ProcessorAttention:
    def __init__(self, state: ModuleState) -> None:
        self.state = state

    def __call__(self, call: AttentionCall) -> Tensor:
        state = self.state
        if not state.enabled:
            return call.dense()
        return state.answer(call)


def _run_any(
    module: Any,
    state: ModuleState,
    forward: Forward,
    args: Any,
    kwargs: dict[str, Any],
    traced: Forward | None,
) -> Any:
    """Any other module: its ``scaled_dot_product_attention`` is ours while it runs."""
    seen = ProjectedFrom()
    answer = _AnyAttention(module, state, seen, args, kwargs)
    with observed(seen):
        if traced is not None and torch.compiler.is_compiling():
            out = call_rebound(answer, traced, module, *args, **kwargs)
        else:
            out = call_with_attention(answer, forward, module, *args, **kwargs)
    if not answer.reached:
        _warn_unreached(module, state)
    return out


class _AnyAttention:
    def __init__(
        self, module: Any, state: ModuleState, seen: ProjectedFrom, args: Any, kwargs: Any
    ) -> None:
        self.module, self.state, self.seen = module, state, seen
        self.args, self.kwargs = args, kwargs
        self.reached = False

    def __call__(self, call: AttentionCall) -> Tensor:
        self.reached = True
        if self._is_self_attention():
            call.gate = gate_of(self.state, self._hidden_states(), call)
            return self.state.answer(call)
        first = self.state.count_dense(CROSS)
        if first and call.query.shape[2] == call.key.shape[2]:
            warnings.warn(
                f"{self.state.name!r} attends from one tensor to another of the same length: it is "
                "taken for cross-attention and stays dense",
                stacklevel=2,
            )
        return call.dense()

    def _is_self_attention(self) -> bool:
        if self.seen.seen:
            return self.seen.one_tensor
        # Projections of a kind that we do not see: one sequence in, one sequence attended.
        tensors = [x for x in (*self.args, *self.kwargs.values()) if _is_sequence(x)]
        return all(x is tensors[0] for x in tensors)

    def _hidden_states(self) -> Tensor | None:
        if self.seen.query is not None:
            return self.seen.query
        return next((x for x in (*self.args, *self.kwargs.values()) if _is_sequence(x)), None)


def _is_sequence(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3


def gate_module(state: ModuleState) -> nn.Module | None:
    """The layer that makes the gate of a call; None: there is none, or it is not wanted."""
    attributes: Any = state.attributes
    wanted = state.enabled and attributes.method == "vsa" and attributes.gate != "none"
    return getattr(state.gate_owner, GATE) if wanted and state.gate_owner is not None else None


def gate_of(state: ModuleState, hidden_states: Any, call: AttentionCall) -> Tensor | None:
    """The trained gate [B, H, tokens, D] of the hidden states [B, tokens, C], or None."""
    project = gate_module(state)
    if project is None:
        return None
    return project(hidden_states).unflatten(-1, (call.query.shape[1], -1)).transpose(1, 2)


def _warn_unreached(module: nn.Module, state: ModuleState) -> None:
    if state.count_dense("scaled_dot_product_attention was not called"):
        warnings.warn(
            f"{state.name!r} ({type(module).__name__}) never called scaled_dot_product_attention, "
            "so its attention was not replaced: it uses kernels of its own",
            stacklevel=2,
        )


# -- one call of attention -------------------------------------------------------------------------


def attend(state: ModuleState, call: AttentionCall) -> Tensor:
    """The answer to a self-attention call of a module: [B, H, S, Dv].

    Raises:
        ValueError: the video shape is not known or does not fit, or the call asks for what the
            method cannot do and is not to run dense then.
    """
    attributes: Any = state.attributes
    info = call_state(state.owner)
    reason = _scheduled(state, info)
    if reason is not None:
        state.count_dense(reason)
        return call.dense()
    try:
        tokens = call_tokens(state, info, call)
    except UnsupportedError as error:
        if attributes.on_unsupported == "raise":
            raise explained(state, error) from None
        warn_dense(state, error)
        return call.dense()
    return compute(state, call, tokens)


def attend_alone(
    state: ModuleState, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None
) -> Tensor:
    """The method of a module on tensors [B, H, S, D], outside of its forward."""
    if state.attributes is None:
        raise ValueError(f"module {state.name!r} has no method")
    call = AttentionCall(query, key, value)
    call.gate = gate
    return compute(state, call, call_tokens(state, None, call))


def _scheduled(state: ModuleState, info: CallInfo | None) -> str | None:
    """Why the schedule leaves this call dense; None: it does not."""
    attributes: Any = state.attributes
    schedule = attributes.schedule
    if state.index < schedule.dense_layers:
        return "dense layer"
    if not schedule.needs_step:
        return None
    if info is None or info.step is None:
        raise ValueError(
            f"the schedule of {state.name!r} has dense steps, but nothing tells the step: sparsify "
            "the pipeline, or run inside `with video_shape(model, shape, step=(index, count))`"
        )
    step, steps = info.step
    return "dense step" if schedule.is_dense_step(step, steps) else None


def call_tokens(state: ModuleState, info: CallInfo | None, call: AttentionCall) -> VideoTokens:
    """How the tokens of a call lie, with the padding that its mask says.

    Raises:
        UnsupportedError: the call asks for more than attention over valid keys.
        ValueError: the video shape is not known, or does not fit.
    """
    length = call.query.shape[2]
    if call.key.shape[2] != length:
        raise UnsupportedError(
            f"has {length} queries and {call.key.shape[2]} keys: they are not the same tokens"
        )
    if call.dropout_p != 0.0:
        raise UnsupportedError(f"asks for dropout_p {call.dropout_p}")
    if call.is_causal:
        raise UnsupportedError("asks for causal attention")
    if call.query.shape[1] != call.key.shape[1] and not call.enable_gqa:
        raise UnsupportedError("has fewer key heads than query heads, without enable_gqa")
    if call.parallel_config is not None:
        raise UnsupportedError("runs under context parallelism: a call sees part of the video")
    tokens = _lie_of_tokens(state, info, length)
    mask = call.attn_mask
    if mask is None or (info is not None and info.masks_text):
        return tokens
    return VideoTokens(tokens.grid, tokens.text_length, tokens.text_first, valid_text(mask, tokens))


def _lie_of_tokens(state: ModuleState, info: CallInfo | None, length: int) -> VideoTokens:
    shape = state.shape_said()
    if info is None:
        if shape is None:
            raise ValueError(
                f"video_shape must be set: {state.name!r} attends over {length} tokens, and "
                "nothing says how the video lies in them. Give 'video_shape': (T, H, W) in the "
                "configuration, call module.set_video_shape((T, H, W)), or run the model inside "
                "`with video_shape(model, (T, H, W)):`"
            )
        tokens = VideoTokens(shape)
    else:
        tokens = info.tokens
        if shape is not None and shape != tokens.grid and not info.said:
            raise ValueError(
                f"the video of this call is {grid_text(tokens.grid)}; that does not match video "
                f"shape {grid_text(shape)}, set for {state.name!r}"
            )
        if info.gathers_text:  # each call holds the valid text of one batch item
            tokens = VideoTokens(tokens.grid, max(0, length - math.prod(tokens.grid)))
    if tokens.sequence_length != length:
        beside = f" and {tokens.text_length} others" if tokens.text_length else ""
        raise ValueError(
            f"sequence length {length} of {state.name!r} does not match video shape "
            f"{grid_text(tokens.grid)}{beside}; tokens beside the video are said by `with "
            "video_shape(model, shape, text_length=...)`"
        )
    return tokens


def warn_dense(state: ModuleState, error: ValueError) -> None:
    """Notes a call that ran dense because the method cannot serve it; warns the first time."""
    if state.count_dense(str(error)):
        warnings.warn(f"a call of {state.name!r} runs dense: it {error}", stacklevel=2)


def explained(state: ModuleState, error: ValueError) -> ValueError:
    """The error with the name of the module, and what to do."""
    return ValueError(
        f"{state.name!r} with method {state.given.get('method', 'vsa')!r} cannot serve this call: "
        f"{error}. The attribute on_unsupported='dense' runs such calls dense"
    )


def compute(state: ModuleState, call: AttentionCall, tokens: VideoTokens) -> Tensor:
    """The method itself; counts the call."""
    attributes: Any = state.attributes
    state.count_sparse(tokens.grid)
    gate: Any = call.gate
    if gate is None and attributes.method == "vsa" and attributes.gate == "sum":
        gate = 1.0
    options = {"scale": call.scale, **state.options}
    if attributes.collect_stats:
        out, density = measured(state.pattern, call, tokens, gate, options)
        state.add_density(density)
        return out
    pattern: Any = state.pattern
    return pattern.attend(call.query, call.key, call.value, tokens, gate=gate, **options)
