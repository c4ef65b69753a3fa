"""ModelAttention: puts an attention type into the transformers of a pipeline, counts and captures.

It goes in around the video self-attention alone, by processors, and comes out again: text encoders,
cross-attention and the VAE never see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...attention_types import TORCH_SDPA, resolve_attention_type
from ...calls import problem_of
from ...functional import named_attention
from ...functional.head_groups import LayerPattern
from ...functional.patterns import Dense, Radial
from ...functional.video_tokens import VideoTokens
from ...integrations.attention_call import AttentionCall
from ...integrations.intercept import replace_processor
from ...integrations.layer import LayerAttention
from ...integrations.models import AttentionLayer, Family, family_of
from ...integrations.steps import TRANSFORMERS, denoising_step, unwrapped
from ...quantize import parse_recipe
from ...registry import Problem, Verdict, why_not
from .. import UsageError
from ..capture import CaptureWriter, Facts
from .kinds import Kind


def video_transformers(pipe: Any) -> list[tuple[Any, Family]]:
    """The video transformers of a pipeline: one, or the two of Wan 2.2.

    Raises:
        UsageError: it has none that is known.
    """
    found = []
    for name in TRANSFORMERS:
        transformer = unwrapped(getattr(pipe, name, None))
        family = family_of(transformer)
        if family is not None:
            found.append((transformer, family))
    if not found:
        raise UsageError(
            f"{type(pipe).__name__} has no video transformer that is known; "
            "video_attn.integrations.models lists those that are"
        )
    return found


@dataclass
class _CallState:
    """What one call of a transformer tells its layers."""

    tokens: VideoTokens
    patterns: list[LayerPattern]
    step: int
    timestep: float


class ModelAttention:
    """An attention type in a pipeline, until ``undo()``. A context manager. For one thread.

    Args:
        before_first: called once, before the first layer of the first call: (tokens, query) whose
            shapes are now known.

    Attributes:
        sparse_calls, dense_calls: attention calls until now. None falls back: what a type cannot
            serve is an error.
        backends: for "sparse" and "dense" calls, every backend and why it does not serve, of the
            first call.
    """

    def __init__(
        self,
        pipe: Any,
        kind: Kind,
        *,
        writer: CaptureWriter | None = None,
        before_first: Callable[[VideoTokens, Tensor], None] | None = None,
    ) -> None:
        self.kind, self.writer = kind, writer
        self.sparse_calls = self.dense_calls = 0
        self.backends: dict[str, list[Verdict]] = {}
        self._pipe, self._before_first = pipe, before_first
        self._state: _CallState | None = None
        self._attentions: list[LayerAttention] = []
        self._hooks: list[Any] = []
        for transformer, family in video_transformers(pipe):
            layers = family.attention_layers(transformer)
            self._put_into(transformer, family, layers)

    def _put_into(self, transformer: Any, family: Family, layers: list[AttentionLayer]) -> None:
        count, heads = 1 + max(x.layer for x in layers), transformer.config.num_attention_heads
        pattern = self.kind.pattern
        if isinstance(pattern, Radial) and pattern.rule is None:
            pattern = replace(pattern, rule=family.rule)
        try:
            self.kind.schedule.check(count, heads)
        except ValueError as error:
            raise UsageError(f"attention type {self.kind.text!r}: {error}") from error

        def before_forward(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs = family.bind(args, kwargs)
            step, steps = denoising_step(module, inputs["timestep"], pipe=self._pipe)
            patterns = self.kind.schedule.patterns(pattern, count, heads, step, steps)
            timestep = float(torch.as_tensor(inputs["timestep"]).max())
            tokens = family.tokens(module, inputs)
            self._state = _CallState(tokens, patterns, step, timestep)

        def serve(index: int, call: AttentionCall) -> Tensor:
            if self._state is None:
                raise RuntimeError("attention was called outside of its transformer's forward")
            return self._serve(call, layers[index].layer, family, self._state)

        hook = transformer.register_forward_pre_hook(before_forward, with_kwargs=True)
        self._hooks.append(hook)
        ours = self.kind.named != "sdpa"  # which lists the valid keys itself
        for index, layer in enumerate(layers):
            attention = LayerAttention(serve, index)
            attention.processor = replace_processor(
                layer.module, attention, without_mask=family.large_mask and ours
            )
            self._attentions.append(attention)

    def _serve(self, call: AttentionCall, layer: int, family: Family, state: _CallState) -> Tensor:
        tokens = state.tokens
        if family.gathers_text:
            tokens = VideoTokens(tokens.grid, call.query.shape[2] - tokens.video_length)
        if self._before_first is not None:
            self._before_first(tokens, call.query)
            self._before_first = None
        if self.writer is not None:
            self._capture(self.writer, call, layer, family, state.step, state.timestep, tokens)
        pattern = state.patterns[layer]
        if isinstance(pattern, Dense):
            self.dense_calls += 1
            return self._dense(call, tokens, family)
        self.sparse_calls += 1
        call.refuse_more(attn_mask=not family.masks_text)
        if "sparse" not in self.backends:
            self.backends["sparse"] = why_not(self._problem(call, pattern))
        precision, quantization = parse_recipe(self.kind.precision)
        return pattern.attend(
            call.query, call.key, call.value, tokens, gate=call.gate, scale=call.scale,
            precision=precision, quantization=quantization,
        )  # fmt: skip

    def _capture(
        self, writer: CaptureWriter, call: AttentionCall, layer: int, family: Family, step: int,
        timestep: float, tokens: VideoTokens,
    ) -> None:  # fmt: skip
        """Offers q, k, v of the call, without the padding behind the text where it is known."""
        length, text, mask = call.query.shape[2], tokens.text_length, "none"
        if tokens.valid_text is not None:
            valid = set(torch.as_tensor(tokens.valid_text).flatten().tolist())
            if len(valid) == 1 and not tokens.text_first:
                text = int(valid.pop())
                length = tokens.video_length + text
            else:
                mask = "padded text"
        elif call.attn_mask is not None and not family.masks_text:
            mask = f"attn_mask {tuple(call.attn_mask.shape)}"
        facts = Facts(
            layer=layer, step=step, timestep=timestep, grid=tokens.grid, text_length=text,
            text_first=tokens.text_first, scale=call.scale, is_causal=call.is_causal, mask=mask,
        )  # fmt: skip
        q, k, v = (x[:, :, :length] for x in (call.query, call.key, call.value))
        writer.offer(q, k, v, facts)

    def _dense(self, call: AttentionCall, tokens: VideoTokens, family: Family) -> Tensor:
        """The named attention; "sdpa" is what the model does by itself."""
        row = resolve_attention_type(self.kind.named)
        if row.backends == (TORCH_SDPA,):
            self.backends.setdefault("dense", [Verdict("the model's own", None, True)])
            return call.dense()
        call.refuse_more(attn_mask=not family.masks_text)
        mask = Dense().mask(tokens, call.query.device)
        if "dense" not in self.backends:
            problem = problem_of("forward", call.query, call.key, call.value, mask)
            self.backends["dense"] = row.why_not(problem)
        out = named_attention(
            call.query, call.key, call.value, self.kind.named, mask, scale=call.scale
        )
        assert isinstance(out, Tensor)
        return out

    def _problem(self, call: AttentionCall, pattern: Any) -> Problem:
        precision, quantization = parse_recipe(self.kind.precision)
        problem = problem_of(
            "forward", call.query, call.key, call.value, None,
            precision=precision, quantization=quantization,
        )  # fmt: skip
        size = pattern.block_size if isinstance(pattern, Radial) else math.prod(pattern.tile)
        return replace(problem, q_block_size=size, kv_block_size=size)

    def undo(self) -> None:
        """Takes it out again."""
        for hook in self._hooks:
            hook.remove()
        for attention in self._attentions:
            if attention.processor is not None:
                attention.processor.undo()
        self._hooks, self._attentions = [], []

    def __enter__(self) -> ModelAttention:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()
