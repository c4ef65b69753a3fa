"""AppliedAttention: what apply() did to a model, the state of its calls, and the way back."""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..calls import problem_of
from ..functional.head_groups import HeadGroups, LayerPattern
from ..functional.patterns import Dense, Radial, SlidingTile, VideoSparse
from ..functional.video_tokens import VideoTokens
from ..layout import Triple
from ..quantize import parse_recipe
from ..registry import select
from .context import call, call_state, enter_call, leave_call
from .context_parallel import attend_in_parallel
from .fuse import FusedProjections
from .guard import guard, unguard
from .intercept import AttentionCall, ReplacedProcessor, replace_processor
from .layer import LayerAttention
from .models import Family
from .schedule import Schedule
from .steps import denoising_step

HANDLE = "_video_attn_applied"


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
            replace_processor(layer.module, attention, without_mask=family.large_mask)
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
            handle._count(dense)
        if dense and handle.precision == "native" and handle.backend is None:
            if self.family.large_mask:
                asked.attn_mask = _key_mask(state.tokens, asked.key.device)
            return asked.dense()
        asked.refuse_more(attn_mask=not self.family.masks_text)
        tokens = self._tokens_of(asked, state)
        precision, quantization = parse_recipe(handle.precision)
        options: dict[str, Any] = {
            "gate": asked.gate, "scale": asked.scale, "precision": precision,
            "backend": handle.backend, "quantization": quantization,
        }  # fmt: skip
        if asked.parallel_config is None:
            return pattern.attend(asked.query, asked.key, asked.value, tokens, **options)

        def attend(query: Tensor, key: Tensor, value: Tensor, first_head: int) -> Tensor:
            part = pattern.of_heads(first_head, first_head + query.shape[1])
            return part.attend(query, key, value, tokens, **options)

        if tokens.text_length > 0:
            raise ValueError(
                "context parallelism mixes the video and the text of the ranks, so a sequence of "
                "both cannot be served: disable it, or undo()"
            )
        return attend_in_parallel(asked, attend)

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
        inputs = self.family.bind(args, kwargs)
        tokens = self.family.tokens(module, inputs)
        self.handle._check_size(tokens)
        step, steps = 0, 1
        if self.handle.schedule.needs_step:
            step, steps = denoising_step(
                module, inputs["timestep"], pipe=self.handle.pipe, timesteps=self.handle.timesteps
            )
            self.handle._check_steps(steps)
        state = CallState(tokens, self.patterns(step, steps))
        self.handle._last_tokens = tokens
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


_CHECKPOINTING = "_gradient_checkpointing_func"


class _CarriedState:
    def __init__(self, owner: AppliedTransformer, function: Any) -> None:
        self.owner, self.function = owner, function

    def __call__(self, module: Any, *args: Any) -> Any:
        state = call_state(self.owner)

        def run(*inputs: Any) -> Any:
            with call(self.owner, state):
                return module(*inputs)

        return self.function(run, *args)


class AppliedAttention:
    """What :func:`apply` did to a model: its figures, and ``undo()``. A context manager.

    Attributes:
        pattern, schedule, precision, backend: as given; the pattern with what the model adds to it.
        sparse_calls, dense_calls: attentions over the video until now, one per layer and call of
            the transformer, counted where attention runs: layers that a cache skips count nothing.
    """

    def __init__(
        self,
        pipe: Any,
        transformers: Sequence[tuple[Any, Family]],
        pattern: LayerPattern,
        schedule: Schedule,
        *,
        precision: str,
        backend: str | None,
        timesteps: Sequence[float] | None,
        size: tuple[int | None, int | None, int | None] = (None, None, None),
        fused: FusedProjections | None = None,
    ) -> None:
        self.pattern, self.schedule = pattern, schedule
        self.precision, self.backend = precision, backend
        self.sparse_calls = self.dense_calls = 0
        self.pipe, self.timesteps = pipe, timesteps
        self._size, self._fused = size, fused
        self._lock, self._said = threading.Lock(), set[int]()
        self._last_tokens: VideoTokens | None = None
        self._applied = [AppliedTransformer(*pair, self) for pair in transformers]
        guard(pipe, [transformer for transformer, _ in transformers])

    def undo(self) -> None:
        """Puts the model back as it was. A second call does nothing."""
        for applied in self._applied:
            if getattr(applied.transformer, HANDLE, None) is self:
                applied.undo()
        unguard(self.pipe)
        if self._fused is not None:
            self._fused.undo()
            self._fused = None

    def __enter__(self) -> AppliedAttention:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def density(self, grid: Triple | None = None) -> float:
        """Token pairs that a sparse step computes over all pairs, the mean of all layers.

        Args:
            grid: tokens (T, H, W) of the video; None: as in the last call.

        Raises:
            RuntimeError: no grid is given, and there was no call.
        """
        tokens = self._last_tokens if grid is None else VideoTokens(grid)
        if tokens is None:
            raise RuntimeError("density needs a grid (T, H, W) before the first call")
        tokens = VideoTokens(tokens.grid, tokens.text_length, tokens.text_first)
        applied = self._applied[0]
        patterns = self._sparse_patterns()
        different = list({id(p): p for p in patterns}.values())
        known = {id(p): p.density(tokens, applied.heads) for p in different}
        return sum(known[id(p)] for p in patterns) / len(patterns)

    def backend_name(self, *, sparse: bool = True) -> str:
        """The backend that runs the sparse calls, or the dense ones, of this model as it is.

        Raises:
            RuntimeError: none can; the message says why for each.
        """
        if not sparse and self.precision == "native" and self.backend is None:
            return "the pipeline's own"
        pattern: LayerPattern | None = Dense()
        if sparse:
            patterns = self._sparse_patterns()
            pattern = next((p for p in patterns if not isinstance(p, Dense)), None)
            if pattern is None:
                return "none: no layer is sparse"
        transformer = self._applied[0].transformer
        device = getattr(self.pipe, "_execution_device", None) or transformer.device
        like = torch.empty(
            1, 1, 0, transformer.config.attention_head_dim, dtype=transformer.dtype, device=device
        )
        precision, quantization = parse_recipe(self.precision)
        problem = problem_of(
            "forward", like, like, like, _mask_like(pattern), precision=precision,
            quantization=quantization,
        )  # fmt: skip
        return select(problem, self.backend).name

    def summary(self) -> Table:
        """What is applied where, and what ran until now, as a table of rich."""
        applied, schedule = self._applied[0], self.schedule
        table = Table(title=f"attention of {applied.family.name}", show_header=False)
        layers = itertools.groupby(enumerate(self._sparse_patterns()), key=lambda item: item[1])
        for pattern, group in layers:
            numbers = [number for number, _ in group]
            table.add_row(f"layers {numbers[0]} to {numbers[-1]}", _describe(pattern))
        dense = f"first {schedule.dense_first_steps}, last {schedule.dense_last_steps}"
        table.add_row("dense steps", dense if schedule.needs_step else "none")
        if schedule.steps:
            table.add_row("steps of their own", str(len(schedule.steps)))
        table.add_row("precision", self.precision)
        for name, sparse in (("sparse", True), ("dense", False)):
            try:
                backend = self.backend_name(sparse=sparse)
            except RuntimeError as error:
                backend = str(error).partition("\n")[0]
            table.add_row(f"backend of {name} calls", backend)
        if self._last_tokens is not None:
            grid = " x ".join(map(str, self._last_tokens.grid))
            table.add_row("video of the last call", f"{grid} tokens")
            table.add_row("density of a sparse step", f"{self.density():.3f}")
        table.add_row("calls", f"{self.sparse_calls} sparse, {self.dense_calls} dense")
        return table

    def _sparse_patterns(self) -> list[LayerPattern]:
        """The patterns of a step that is not dense."""
        schedule = Schedule(self.schedule.dense_layers, overrides=self.schedule.overrides)
        applied = self._applied[0]
        layers = 1 + max(layer.layer for layer in applied.layers)
        return schedule.patterns(self.pattern, layers, applied.heads)

    def _count(self, dense: bool) -> None:
        with self._lock:
            self.dense_calls += dense
            self.sparse_calls += not dense

    def _check_steps(self, steps: int) -> None:
        """Says once if the schedule leaves no step of such a run to sparse attention."""
        if isinstance(self.pattern, Dense):
            return
        dense = all(self.schedule.is_dense_step(step, steps) for step in range(steps))
        if dense and steps not in self._said:
            self._said.add(steps)
            warnings.warn(
                f"all {steps} steps of this run are dense: the schedule keeps "
                f"{self.schedule.dense_first_steps} first and {self.schedule.dense_last_steps} "
                "last steps dense; shares (dense_first_steps=0.25) suit runs of few steps",
                stacklevel=2,
            )

    def _check_size(self, tokens: VideoTokens) -> None:
        """Raises ValueError where sizes were said beforehand and this call has others."""
        if any(n not in (None, m) for n, m in zip(self._size, tokens.grid, strict=True)):
            given = " x ".join("any" if n is None else str(n) for n in self._size)
            t, h, w = tokens.grid
            raise ValueError(
                f"this call has a video of {t} x {h} x {w} tokens, but attention was applied for "
                f"{given}; apply again with the height, width and num_frames of this generation"
            )


def _key_mask(tokens: VideoTokens, device: torch.device) -> Tensor:
    """bool [B, 1, 1, S]: the keys that are valid."""
    valid = torch.as_tensor(tokens.valid_text, device=device).reshape(-1, 1)
    keys = torch.arange(tokens.sequence_length, device=device)
    return (keys < tokens.video_length + valid)[:, None, None]


def _mask_like(pattern: LayerPattern | None) -> Any:
    """A mask with the block sizes of ``pattern``, to ask who serves it."""
    if isinstance(pattern, HeadGroups):
        pattern = pattern.groups[0].pattern
    if isinstance(pattern, (SlidingTile, VideoSparse)):
        return SlidingTile(1, pattern.tile).mask(VideoTokens(pattern.tile))
    if isinstance(pattern, Radial):
        tokens = VideoTokens((1, 1, pattern.block_size))
        return Radial(None, pattern.block_size).mask(tokens)
    return None


def _describe(pattern: LayerPattern) -> str:
    """A pattern on one line, long lists shortened."""
    text = repr(pattern)
    return text if len(text) <= 120 else text[:117] + "..."
