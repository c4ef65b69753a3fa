"""AppliedTransformer: one transformer with other attention, and what each of its calls knows."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional.head_groups import LayerPattern
from ..functional.patterns import Dense, SlidingTile
from ..functional.video_tokens import VideoTokens
from ..quantize import parse_recipe
from .attention_call import AttentionCall
from .context import call, call_state, enter_call, leave_call
from .context_parallel import attend_in_parallel
from .fused_norms import FusedNorms, attend_tiles, finish_call, look_at_chips
from .intercept import ReplacedProcessor, replace_processor
from .layer import LayerAttention
from .models import Family
from .steps import denoising_step

if TYPE_CHECKING:
    from .applied import AppliedAttention

HANDLE = "_video_attn_applied"
_CHECKPOINTING = "_gradient_checkpointing_func"


@dataclass
class CallState:
    """What one call of a transformer knows, for its layers."""

    tokens: VideoTokens
    patterns: list[LayerPattern]
    token: Any = None
    counted: set[int] = field(default_factory=set)


class AppliedTransformer:
    """One transformer with other attention: its processors, its hooks, and how a layer is served.

    Everything of a call travels with the call (see :mod:`.context`): any number of threads and
    pipelines may run the transformer at once.
    """

    def __init__(self, transformer: Any, family: Family, handle: AppliedAttention) -> None:
        self.transformer, self.family, self.handle = transformer, family, handle
        self.layers = family.attention_layers(transformer)
        self.heads: int = transformer.config.num_attention_heads
        self.attentions = [LayerAttention(self.serve, i) for i in range(len(self.layers))]
        self._patterns: dict[tuple[int, int], list[LayerPattern]] = {}
        self._checkpointing: Any = None
        self.processors = [
            replace_processor(
                layer.module,
                attention,
                without_mask=family.large_mask,
                norms=self._norms(layer.module, attention.index),
            )
            for layer, attention in zip(self.layers, self.attentions, strict=True)
        ]
        for attention, processor in zip(self.attentions, self.processors, strict=True):
            attention.processor = processor
        # Hooks of torch.nn stay outside of what torch.compile traces, and outside of the wrappers
        # that accelerate and diffusers put around forward.
        self._hooks = [
            transformer.register_forward_pre_hook(_hook()(self._before_forward), with_kwargs=True),
            transformer.register_forward_hook(_hook()(self._after_forward), always_call=True),
        ]
        self._compiled: Any = None
        transformer.__dict__["compile"] = self._compile
        if transformer._compiled_call_impl is not None:
            self._stand_around_compiled()
        setattr(transformer, HANDLE, handle)

    def undo(self) -> None:
        """Puts the transformer back as it was; what others have set meanwhile stays."""
        delattr(self.transformer, HANDLE)
        del self.transformer.__dict__["compile"]
        if self._compiled is not None:
            self.transformer._compiled_call_impl = self._compiled
        for hook in self._hooks:
            hook.remove()
        for processor in self.processors:
            processor.undo()
        if isinstance(self.transformer.__dict__.get(_CHECKPOINTING), _CarriedState):
            setattr(self.transformer, _CHECKPOINTING, self._checkpointing)

    def serve(self, index: int, asked: AttentionCall) -> Tensor:
        """Answers the attention of one layer."""
        state: CallState | None = call_state(self)
        layer = self.layers[index]
        if state is None:
            raise RuntimeError(
                f"{layer.name} was called outside of the forward of its transformer, so the grid "
                "of the video is unknown; call the transformer, or undo() first"
            )
        pattern, handle = state.patterns[layer.layer], self.handle
        dense = isinstance(pattern, Dense)
        if index not in state.counted:
            state.counted.add(index)
            handle.count(dense)
        if self._is_own(pattern):
            if asked.deferred is not None:  # in compiled code, which is the same for all steps
                finish_call(asked)
            if self.family.large_mask:
                asked.attn_mask = _key_mask(state.tokens, asked.key.device)
            return asked.dense()
        asked.refuse_more(attn_mask=not self.family.masks_text)
        tokens = self._tokens_of(asked, state)
        precision, quantization = parse_recipe(handle.precision)
        options: dict[str, Any] = {
            "precision": precision, "backend": handle.backend, "quantization": quantization,
        }  # fmt: skip
        if asked.deferred is not None:
            tokens.check(asked.query, asked.key)
            if type(pattern) is SlidingTile:  # one that is derived may attend otherwise
                return attend_tiles(asked, pattern, tokens, options)
            finish_call(asked)
        if asked.parallel_config is None:
            return pattern.attend(
                asked.query, asked.key, asked.value, tokens, gate=asked.gate, scale=asked.scale,
                **options,
            )  # fmt: skip
        if tokens.text_length > 0:
            raise ValueError(
                "context parallelism mixes the video and the text of the ranks, so a sequence of "
                "both cannot be served: disable it, or undo()"
            )
        return attend_in_parallel(asked, pattern, tokens, **options)

    def _is_own(self, pattern: LayerPattern) -> bool:
        """Whether a layer of this pattern is left to the model's own attention."""
        handle = self.handle
        return isinstance(pattern, Dense) and handle.precision == "native" and not handle.backend

    def _norms(self, module: Any, index: int) -> FusedNorms | None:
        """How norms and rotary positions of a layer are put off; None where they are not."""
        kind = type(module.processor)
        rotary = self.family.rotary.get(kind.__name__)
        if not self.handle.fuse_norms or rotary is None:
            return None
        own = kind.__module__.startswith("diffusers.")
        return FusedNorms(module, rotary, self._defers, index) if own else None

    def _defers(self, index: int) -> bool:
        """Whether this call of a layer has its norms put off: not where nothing of it is ours."""
        if torch.compiler.is_compiling():
            return True
        state: CallState | None = call_state(self)
        return state is not None and not self._is_own(state.patterns[self.layers[index].layer])

    def _tokens_of(self, asked: AttentionCall, state: CallState) -> VideoTokens:
        """The tokens of one call of attention, on its device."""
        tokens = state.tokens
        if self.family.gathers_text:
            return VideoTokens(tokens.grid, asked.query.shape[2] - tokens.video_length)
        valid, device = tokens.valid_text, asked.query.device
        if isinstance(valid, Tensor) and valid.device != device:  # a model over several GPUs
            return replace(tokens, valid_text=valid.to(device))
        return tokens

    def _before_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook: what this call knows."""
        for layer, processor in zip(self.layers, self.processors, strict=True):
            if not processor.is_set:
                raise RuntimeError(
                    f"the attention processor of {layer.name} was replaced after apply(): call "
                    "undo() first, change it, and apply again"
                )
        look_at_chips()
        inputs = self.family.bind(args, kwargs)
        tokens = self.family.tokens(module, inputs)
        self.handle.check_size(tokens)
        step, steps = 0, 1
        if self.handle.schedule.needs_step:
            step, steps = denoising_step(
                module, inputs["timestep"], pipe=self.handle.pipe, timesteps=self.handle.timesteps
            )
            self.handle.check_steps(steps)
        state = CallState(tokens, self.patterns(step, steps))
        self.handle.last_tokens = tokens
        state.token = enter_call(self, state)
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            self._carry_state()

    def _after_forward(self, module: Any, args: tuple, output: Any) -> None:
        """The hook after it, also where forward raised."""
        state: CallState | None = call_state(self)
        if state is not None:
            leave_call(state.token)

    __reduce_ex__ = ReplacedProcessor.__reduce_ex__

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """``transformer.compile(...)`` while attention is applied."""
        type(self.transformer).compile(self.transformer, *args, **kwargs)
        self._stand_around_compiled()

    def _stand_around_compiled(self) -> None:
        """A module that is compiled in place has its hooks compiled with it, which ours cannot be:
        they step out of it, and stand around the compiled call.
        """
        for hook in self._hooks:
            hook.remove()
        transformer, compiled = self.transformer, self.transformer._compiled_call_impl
        self._compiled = compiled

        def call_compiled(*args: Any, **kwargs: Any) -> Any:
            self._before_forward(transformer, args, kwargs)
            try:
                return compiled(*args, **kwargs)
            finally:
                self._after_forward(transformer, args, None)

        transformer._compiled_call_impl = call_compiled

    def patterns(self, step: int, steps: int) -> list[LayerPattern]:
        """The pattern of each layer of the schedule in one step."""
        if (step, steps) not in self._patterns:
            handle = self.handle
            layers = 1 + max(layer.layer for layer in self.layers)
            self._patterns[step, steps] = handle.schedule.patterns(
                handle.pattern, layers, self.heads, step, steps
            )
        return self._patterns[step, steps]

    def _carry_state(self) -> None:
        """Gradient checkpointing runs a block again in the backward pass, when the call is over and
        others may have been made: the block must then see the state of its own call.
        """
        function = getattr(self.transformer, _CHECKPOINTING)
        if not isinstance(function, _CarriedState):
            self._checkpointing = function
            setattr(self.transformer, _CHECKPOINTING, _CarriedState(self, function))


@functools.cache
def _hook() -> Any:
    """The class of hooks that torch.compile does not trace, and that are not copied with a module.

    Made when it is needed: torch.compiler.disable imports the compiler.
    """

    class Hook:
        __reduce_ex__ = ReplacedProcessor.__reduce_ex__

        def __init__(self, function: Any) -> None:
            self.function = function

        @torch.compiler.disable
        def __call__(self, *args: Any) -> Any:
            return self.function(*args)

    return Hook


class _CarriedState:
    def __init__(self, owner: AppliedTransformer, function: Any) -> None:
        self.owner, self.function = owner, function

    def __call__(self, module: Any, *args: Any) -> Any:
        state = call_state(self.owner)

        def run(*inputs: Any) -> Any:
            with call(self.owner, state):
                return module(*inputs)

        return self.function(run, *args)


def _key_mask(tokens: VideoTokens, device: torch.device) -> Tensor:
    """bool [B, 1, 1, S]: the keys that are valid."""
    valid = torch.as_tensor(tokens.valid_text, device=device).reshape(-1, 1)
    keys = torch.arange(tokens.sequence_length, device=device)
    return (keys < tokens.video_length + valid)[:, None, None]
