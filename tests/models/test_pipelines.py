"""What people do to pipelines, with attention applied. docs/models.md has a row for each test."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import MODELS, output, random
from tiny_wan import (
    CALLS,
    FIRST,
    FRAMES,
    HEIGHT,
    LAYERS,
    PATTERN,
    STEPS,
    WIDTH,
    counts,
    error,
    latents,
    tiny_transformer,
    tiny_vae,
    tiny_wan,
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
from video_attn.integrations import Schedule, applied_to, apply, presets
from video_attn.integrations.attention_call import AttentionCall
from video_attn.integrations.dispatcher import BACKENDS, register_with_diffusers, unregister
from video_attn.integrations.intercept import call_with_attention
from video_attn.integrations.models import family_of

dispatch = pytest.importorskip("diffusers.models.attention_dispatch")


# -- steps -----------------------------------------------------------------------------------------


def test_pipelines_that_share_a_transformer(pipe: Any) -> None:
    """Each has its own steps: those of the pipeline that runs hold, in any order."""
    other = tiny_wan(transformer=pipe.transformer)
    with apply(pipe, PATTERN, schedule=Schedule(dense_first_steps=1, dense_last_steps=1)) as handle:
        alone = latents(pipe)
        assert counts(handle) == ((STEPS - 2) * CALLS, 2 * CALLS)
        latents(other, num_inference_steps=7)
        assert counts(handle) == ((STEPS - 2 + 5) * CALLS, 4 * CALLS)
        assert torch.equal(latents(pipe), alone)


def test_threads_that_share_a_transformer(pipe: Any) -> None:
    """Two sizes at once, steps in each other's way: each video is the one that it is alone."""
    sizes = [{"height": 64, "width": 96}, {"height": 96, "width": 64, "num_inference_steps": 3}]
    pipes = [pipe, tiny_wan(transformer=pipe.transformer)]
    with apply(pipe, PATTERN, schedule=FIRST):
        alone = [latents(p, **size) for p, size in zip(pipes, sizes, strict=True)]
        together: list[Any] = [None, None]

        def run(index: int) -> None:
            together[index] = [latents(pipes[index], **sizes[index]) for _ in range(3)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for expected, got in zip(alone, together, strict=True):
        assert all(torch.equal(video, expected) for video in got)


def test_a_scheduler_that_calls_twice_per_step() -> None:
    """Heun: 4 steps are 7 calls of the transformer at 4 timesteps."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = tiny_wan(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0))
    schedule = Schedule(dense_first_steps=1, dense_last_steps=1)
    with apply(pipe, PATTERN, schedule=schedule) as handle:
        latents(pipe)
    first_and_last = 1 + 1  # the first timestep is called once more in the second half of its step
    calls = (2 * STEPS - 1) * CALLS
    assert sum(counts(handle)) == calls
    assert handle.dense_calls in (first_and_last * CALLS, (first_and_last + 1) * CALLS)
    assert handle.dense_calls > CALLS


def test_video_to_video_counts_the_steps_that_are_run() -> None:
    pipe = tiny_wan("WanVideoToVideoPipeline")
    video = [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * FRAMES
    with apply(pipe, PATTERN, schedule=FIRST) as handle:
        from PIL import Image

        latents(
            pipe, video=[Image.fromarray(x) for x in video], strength=0.5, num_frames=None,
            num_inference_steps=6,
        )  # fmt: skip
    assert counts(handle) == (2 * CALLS, CALLS)


def test_image_to_video_with_timesteps_per_token() -> None:
    """Wan 2.2 TI2V: the tokens of the image have timestep 0, all others that of the step."""
    from PIL import Image

    pipe = tiny_wan("WanImageToVideoPipeline", tiny_transformer(), expand_timesteps=True)
    image = Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    dense = latents(pipe, image=image)
    schedule = Schedule(dense_first_steps=1, dense_last_steps=1)
    with apply(pipe, PATTERN, schedule=schedule) as handle:
        sparse = latents(pipe, image=image)
    assert counts(handle) == ((STEPS - 2) * CALLS, 2 * CALLS)
    assert error(sparse, dense) > 1e-3
    with apply(pipe, SlidingTile((9, 9, 9), PATTERN.tile), schedule=schedule):
        assert error(latents(pipe, image=image), dense) < 1e-4


def test_few_steps_that_are_all_dense_say_so(pipe: Any) -> None:
    schedule = Schedule(dense_first_steps=12)
    with apply(pipe, PATTERN, schedule=schedule) as handle:
        with pytest.warns(UserWarning, match=f"all {STEPS} steps of this run are dense"):
            latents(pipe)
        assert handle.sparse_calls == 0
    with apply(pipe, **(presets.wan_few_steps() | {"pattern": PATTERN})) as handle:
        latents(pipe)
    assert counts(handle) == ((STEPS - 1) * CALLS, CALLS)


def test_a_transformer_alone_is_told_the_timesteps() -> None:
    model, inputs = tiny_transformer(), MODELS["wan"].inputs(1)
    inputs["hidden_states"] = random(1, 16, 3, 8, 12)
    with apply(model, PATTERN, schedule=FIRST, timesteps=[900, 500, 100]) as handle:
        output(model, inputs)  # timestep 500
        assert counts(handle) == (LAYERS, 0)
        output(model, inputs | {"timestep": torch.tensor([900.0])})
        assert counts(handle) == (LAYERS, LAYERS)
    with apply(model, PATTERN, schedule=FIRST), pytest.raises(ValueError, match="give timesteps="):
        output(model, inputs)


def test_an_interrupt_leaves_nothing_behind(pipe: Any) -> None:
    with apply(pipe, PATTERN, schedule=FIRST) as handle:
        expected = latents(pipe)

        def stop(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            pipe._interrupt = step == 1
            return tensors

        before = sum(counts(handle))
        latents(pipe, callback_on_step_end=stop)
        assert sum(counts(handle)) - before == 2 * CALLS

        def fail(*_: Any) -> Any:
            raise ZeroDivisionError

        failing = pipe.transformer.proj_out.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            latents(pipe)
        failing.remove()
        attention = pipe.transformer.blocks[0].attn1
        with pytest.raises(RuntimeError, match="outside of the forward of its transformer"):
            attention(random(1, 72, 24))
        assert torch.equal(latents(pipe), expected)


# -- sizes, batches, weights -----------------------------------------------------------------------


def test_another_size_and_a_batch_follow(pipe: Any) -> None:
    """A second resolution, more frames, two prompts with guidance; each is the definition's."""
    everything = SlidingTile((9, 9, 9), (2, 2, 2))
    for options in (
        {"height": 96, "width": 64},
        {"num_frames": 13},
        {"prompt_embeds": random(2, 6, 16), "negative_prompt_embeds": torch.zeros(2, 6, 16)},
    ):
        dense = latents(pipe, **options)
        with apply(pipe, PATTERN):
            latents(pipe)
            assert error(latents(pipe, **options), dense) > 1e-3
        with apply(pipe, everything):
            latents(pipe)
            assert error(latents(pipe, **options), dense) < 1e-4


class Lora(nn.Linear):
    """A linear layer with a low-rank addition, as peft puts in the place of one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_a_lora_works_and_is_not_fused_away(pipe: Any) -> None:
    everything = SlidingTile((9, 9, 9), PATTERN.tile)
    plain = latents(pipe)
    torch.manual_seed(5)
    for block in pipe.transformer.blocks:
        block.attn1.to_q = Lora(block.attn1.to_q)
    dense = latents(pipe)
    assert error(dense, plain) > 1e-3
    with apply(pipe, everything):
        assert error(latents(pipe), dense) < 1e-4
    with pytest.raises(ValueError, match=r"fuse_qkv must be False: .*attn1.to_q carries a LoRA"):
        apply(pipe, everything, fuse_qkv=True)
    assert applied_to(pipe) is None and torch.equal(latents(pipe), dense)


def test_fused_projections(pipe: Any) -> None:
    with apply(pipe, PATTERN):
        expected = latents(pipe)
    weights = set(pipe.transformer.state_dict())
    with apply(pipe, PATTERN, fuse_qkv=True):
        assert hasattr(pipe.transformer.blocks[0].attn1, "to_qkv")
        assert error(latents(pipe), expected) < 1e-4
    assert set(pipe.transformer.state_dict()) == weights
    pipe.transformer.fuse_qkv_projections()
    with apply(pipe, PATTERN, fuse_qkv=True):
        assert error(latents(pipe), expected) < 1e-4
    assert pipe.transformer.blocks[0].attn1.fused_projections  # as the user left it


def test_weights_that_cannot_be_fused_are_refused(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    with pytest.raises(ValueError, match="is stored as torch.float8_e4m3fn"):
        apply(pipe, PATTERN, fuse_qkv=True)
    with apply(pipe, PATTERN) as handle:  # fp8 weights by themselves are fine
        assert latents(pipe).isfinite().all()
    assert handle.sparse_calls == STEPS * CALLS


@pytest.mark.parametrize("kind", ["model", "group"])
def test_offload(pipe: Any, kind: str) -> None:
    """On a CPU: the hooks of accelerate and diffusers come and go around ours. Sequential offload
    needs a GPU: tests/models/test_cogvideox.py.
    """
    with apply(pipe, PATTERN, schedule=FIRST) as handle:
        expected = latents(pipe)
        if kind == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            pipe.transformer.enable_group_offload(
                onload_device=torch.device("cpu"), offload_type="leaf_level"
            )
        assert torch.equal(latents(pipe), expected)
        assert counts(handle) == (2 * (STEPS - 1) * CALLS, 2 * CALLS)
    with apply(pipe, PATTERN, schedule=FIRST):
        assert torch.equal(latents(pipe), expected)


def test_caches_skip_layers_and_their_counts(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    with apply(pipe, PATTERN) as handle:
        expected = latents(pipe)
        before = handle.sparse_calls
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        cached = latents(pipe)
        # After the first step, the first layer alone is run.
        assert handle.sparse_calls - before == CALLS + (STEPS - 1) * 2
        assert error(cached, expected) > 1e-3
        pipe.transformer.disable_cache()
        assert torch.equal(latents(pipe), expected)


def test_pyramid_attention_broadcast(pipe: Any) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    with apply(pipe, PATTERN) as handle:
        pipe.transformer.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 2000),
                spatial_attention_block_identifiers=["blocks"],
                current_timestep_callback=lambda: pipe._current_timestep,
            )
        )
        assert latents(pipe).isfinite().all()
        assert 0 < handle.sparse_calls < STEPS * CALLS
        pipe.transformer.disable_cache()


# -- copies and replacements -----------------------------------------------------------------------


def test_a_transformer_that_takes_the_place_is_refused(pipe: Any) -> None:
    kind = type(pipe)
    with apply(pipe, PATTERN):
        with pytest.raises(RuntimeError, match="transformer has attention applied to it"):
            pipe.transformer = tiny_transformer()
        assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")  # the same, wrapped
        pipe.scheduler = pipe.scheduler
        twin = copy.copy(pipe)  # as servers make one per request
        with pytest.raises(RuntimeError, match="transformer has attention applied to it"):
            twin.transformer = tiny_transformer()
    assert type(pipe) is kind
    pipe.transformer = twin.transformer = tiny_transformer()


def test_a_wrapped_forward(pipe: Any) -> None:
    expected, forward = None, pipe.transformer.forward
    with apply(pipe, PATTERN, schedule=FIRST):
        expected = latents(pipe)
        pipe.transformer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        assert torch.equal(latents(pipe), expected)


def test_copies_say_undo_and_saving_needs_none(pipe: Any, tmp_path: Path) -> None:
    import pickle

    with apply(pipe, PATTERN):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"call undo\(\) on its handle before"):
                copied(pipe.transformer)
        sparse = latents(pipe)
        pipe.save_pretrained(tmp_path)
    index = (tmp_path / "model_index.json").read_text(encoding="utf-8")
    assert '"_class_name": "WanPipeline"' in index
    loaded = type(pipe.transformer).from_pretrained(tmp_path / "transformer")
    twin = tiny_wan(transformer=copy.deepcopy(loaded))
    assert torch.equal(latents(twin), latents(pipe))
    with apply(twin, PATTERN):
        assert torch.equal(latents(twin), sparse)


# -- other attention -------------------------------------------------------------------------------


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


# -- schedules and summaries -----------------------------------------------------------------------


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
