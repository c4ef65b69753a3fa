"""As test_pipelines.py: other attention of diffusers, and every pattern."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODELS, output
from tiny_wan import (
    CALLS,
    FIRST,
    HEIGHT,
    LAYERS,
    PATTERN,
    STEPS,
    WIDTH,
    counts,
    error,
    latents,
    tiny_vae,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from video_attn import (
    BlockMask,
    Dense,
    HeadGroup,
    HeadGroups,
    Radial,
    SlidingTile,
    VideoSparse,
    VideoTokens,
    attention,
)
from video_attn.functional.token_pattern import TokenPattern
from video_attn.integrations import Schedule, apply, presets
from video_attn.integrations.attention_call import AttentionCall
from video_attn.integrations.dispatcher import BACKENDS, register_with_diffusers, unregister
from video_attn.integrations.intercept import call_with_attention
from video_attn.integrations.models import family_of

dispatch = pytest.importorskip("diffusers.models.attention_dispatch")


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The key lengths of calls of diffusers' backend "_native_math"."""
    registry = dispatch._AttentionBackendRegistry
    name = dispatch.AttentionBackendName._NATIVE_MATH
    lengths: list[int] = []
    original = registry._backends[name]

    def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(key.shape[1])
        return original(query, key, *args, **kwargs)

    monkeypatch.setitem(registry._backends, name, spy)
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    yield lengths


@pytest.mark.parametrize("when", ["before", "after"])
def test_backends_of_diffusers_keep_dense_and_cross_attention(
    pipe: Any, spied: list[int], when: str
) -> None:
    video, text = 72, 6
    if when == "before":
        pipe.transformer.set_attention_backend("_native_math")
    with apply(pipe, PATTERN, schedule=FIRST) as handle:
        if when == "after":
            pipe.transformer.set_attention_backend("_native_math")
        latents(pipe)
    assert spied.count(video) == handle.dense_calls == CALLS
    assert spied.count(text) == STEPS * CALLS
    assert pipe.transformer.blocks[0].attn1.processor._attention_backend is not None


@pytest.mark.parametrize("name", list(BACKENDS))
def test_the_switch_of_diffusers(name: str) -> None:
    registry = dispatch._AttentionBackendRegistry
    active, members = registry._active_backend, list(dispatch.AttentionBackendName)
    tiny, model, other = MODELS["wan"], MODELS["wan"].model(), MODELS["wan"].model()
    inputs = tiny.inputs(1)
    dense = output(model, inputs)
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend(name)
    register_with_diffusers()
    register_with_diffusers()
    try:
        model.set_attention_backend(name)
        assert registry._active_backend is active
        got = output(model, inputs)
        assert error(got, dense) < (1e-4 if name == "video_attn" else 0.3)
        assert not torch.equal(got, dense)
        assert torch.equal(output(other, inputs), dense)
        model.reset_attention_backend()
        assert torch.equal(output(model, inputs), dense)
    finally:
        unregister()
    unregister()
    assert list(dispatch.AttentionBackendName) == members
    assert set(registry._backends) == set(registry._supported_arg_names)
    assert not any(getattr(key, "value", key) in BACKENDS for key in registry._backends)


@pytest.mark.parametrize(
    "pattern", [PATTERN, Radial(block_size=8), VideoSparse(0.4, tile=(2, 2, 2))]
)
def test_every_pattern_with_sage(pipe: Any, pattern: Any) -> None:
    with apply(pipe, pattern, schedule=FIRST):
        expected = latents(pipe)
    for precision in ("sage_fp16", "sage_fp8", "fp8"):
        with apply(pipe, pattern, schedule=FIRST, precision=precision) as handle:
            got = latents(pipe)
            assert handle.backend_name() == handle.backend_name(sparse=False)
        assert 0 < error(got, expected) < 0.7
        assert counts(handle) == ((STEPS - 1) * CALLS, CALLS)


def test_a_learned_gate_is_used() -> None:
    """VSA: a module with to_gate_compress gets its coarse branch; a zero gate is none."""
    tiny, model = MODELS["wan"], MODELS["wan"].model()
    inputs, pattern = tiny.inputs(1), VideoSparse(0.4, tile=(2, 2, 2))
    with apply(model, pattern):
        sparse = output(model, inputs)
    for block in model.blocks:
        block.attn1.to_gate_compress = nn.Linear(24, 24)
        nn.init.zeros_(block.attn1.to_gate_compress.weight)
        nn.init.zeros_(block.attn1.to_gate_compress.bias)
    with apply(model, pattern):
        assert error(output(model, inputs), sparse) < 1e-5
        for block in model.blocks:
            nn.init.ones_(block.attn1.to_gate_compress.bias)
        gated = output(model, inputs)
    with apply(model, VideoSparse(0.4, tile=(2, 2, 2), gate=None)):
        assert error(output(model, inputs), gated) < 1e-4
    assert error(gated, sparse) > 1e-3


def test_windows_of_a_search(pipe: Any, tmp_path: Path) -> None:
    """A JSON file of windows per step, layer and head, against patterns per step by hand."""
    import json

    windows = {
        f"{step}_{layer}_{head}": [1 + step % 2, 1, 1 + head]
        for step in range(STEPS) for layer in range(LAYERS) for head in range(2)
    }  # fmt: skip
    path = tmp_path / "windows.json"
    path.write_text(json.dumps(windows), encoding="utf-8")
    schedule = Schedule.from_windows(path, tile=(2, 2, 2), dense_last_steps=1)
    assert schedule.num_steps == STEPS
    of_step = schedule.patterns(PATTERN, LAYERS, 2, 1, STEPS)
    assert of_step == [SlidingTile([(2, 1, 1), (2, 1, 2)], (2, 2, 2))] * LAYERS
    with apply(pipe, PATTERN, schedule=schedule) as handle:
        latents(pipe)
        assert counts(handle) == ((STEPS - 1) * CALLS, CALLS)
        with pytest.raises(ValueError, match=f"made for {STEPS} steps, but this run has 3"):
            latents(pipe, num_inference_steps=3)
    for wrong, words in (
        ({"0_x_0": [1, 1, 1]}, "STEP_LAYER_HEAD"),
        ({"0_0_1": [1, 1, 1]}, "lacks some of its heads"),
        ({"0_0_0": [1, 1]}, "three integers"),
        ({"0_0": [1, 1, 1], "0_0_0": [1, 1, 1]}, "some keys name a step"),
    ):
        with pytest.raises(ValueError, match=words):
            Schedule.from_windows(wrong)


def test_a_summary_says_what_is_applied(pipe: Any) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, quiet=True)
    schedule = Schedule(dense_layers=1, dense_first_steps=1)
    with apply(pipe, PATTERN, schedule=schedule) as handle:
        latents(pipe)
        with console.capture():
            console.print(handle.summary())
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(handle.summary())
        text = console.export_text()
    assert "attention of Wan" in text and "SlidingTile(window=((1, 1, 2),)" in text
    assert "Dense()" in text and "3 x 4 x 6 tokens" in text
    assert f"{handle.sparse_calls} sparse, {handle.dense_calls} dense" in text


def test_presets_fit_every_model() -> None:
    names = [name for name in vars(presets) if name.islower() and not name.startswith("_")]
    made = {name: getattr(presets, name) for name in names if callable(getattr(presets, name))}
    assert len(made) >= 10
    model = MODELS["wan"].model()
    for preset in made.values():
        apply(model, **preset(precision="sage_fp8")).undo()
    assert isinstance(Dense(), type(Schedule(dense_layers=2).patterns(PATTERN, 2, 2)[0]))
    assert tiny_vae() is not None and family_of(model).name == "Wan"


@dataclass(frozen=True)
class SameFrame(TokenPattern):
    """A pattern of somebody else's: every token sees its own frame."""

    def _attend(self, qkv: Any, tokens: VideoTokens, gate: Any, options: Any) -> Tensor:
        frame = tokens.grid[1] * tokens.grid[2]
        keep = torch.eye(tokens.grid[0], dtype=torch.bool)[None, None]
        length = tokens.sequence_length
        mask = BlockMask.from_dense(keep, frame, frame, q_len=length, kv_len=length)
        return attention(*qkv, mask, **options)


def test_a_pattern_of_somebody_else(pipe: Any) -> None:
    """One class is all that a new pattern needs: apply, schedules and groups of heads take it."""
    dense = latents(pipe)
    frame = (HEIGHT // 16) * (WIDTH // 16)

    def same_frame(call: AttentionCall) -> Tensor:
        if call.key.shape[2] != call.query.shape[2] or call.query.shape[2] % frame:
            return call.dense()
        q, k, v = (x.unflatten(2, (-1, frame)) for x in (call.query, call.key, call.value))
        return scaled_dot_product_attention(q, k, v).flatten(2, 3)

    defined = call_with_attention(same_frame, latents, pipe)
    assert error(defined, dense) > 1e-2
    groups = HeadGroups([HeadGroup([0], SameFrame()), HeadGroup([1], SameFrame())])
    for pattern in (SameFrame(), groups):
        with apply(pipe, pattern) as handle:
            assert error(latents(pipe), defined) < 1e-4
            assert counts(handle) == (STEPS * CALLS, 0)
    with apply(pipe, PATTERN, schedule=Schedule(overrides={0: SameFrame(), 1: SameFrame()})):
        assert error(latents(pipe), defined) < 1e-4
