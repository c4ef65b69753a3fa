"""A whole CogVideoX pipeline with radial attention: tiny random weights, the real code around them.

What it computes is compared with the same pipeline under torch's attention and a token mask made
from the definition; what it leaves behind, with the same pipeline before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from radial_oracle import Definition, allowed_pairs, block_mask, frame_scenes
from tiny_cogvideox import FRAMES, HEIGHT, TEXT, WIDTH, CogVideoXPipeline, render, tiny_pipeline
from torch import Tensor
from torch.nn import functional as F

from radial_attn.models.cogvideox import (
    CogVideoXSparseAttnProcessor2_0,
    replace_cogvideox_attention,
    replace_sparse_forward,
)
from video_attn.integrations import Schedule, applied_to, apply
from video_attn.integrations import cogvideox as integration
from video_attn.integrations.cogvideox import layout_of
from video_attn.integrations.pipeline import denoising_step
from video_attn.integrations.sdpa import call_with_attention
from video_attn.patterns.radial import RadialRule
from video_attn.patterns.scene import Scenes
from video_attn.registry import backends

LAYERS, STEPS, BLOCK = 3, 4, 4
MODELS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"rotary": True},
    "1.5": {"rotary": True, "patch_t": 2},
}
# In tiny frames the published split of 128 drops all far frames, so most tests turn it off.
RULE = RadialRule(decay_factor=0.2, neighbor_fraction=0.25, split_width=0, min_window=2)
EVERYTHING = RadialRule(decay_factor=1e6, split_width=0)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model, saved as its real checkpoint would be."""
    root = tmp_path_factory.mktemp("cogvideox")
    for name, options in MODELS.items():
        tiny_pipeline(layers=LAYERS, **options).save_pretrained(root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture
def load(folders: dict[str, Path]) -> Callable[[str], CogVideoXPipeline]:
    def load(name: str = "5b") -> CogVideoXPipeline:
        pipe = CogVideoXPipeline.from_pretrained(folders[name], local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def pipe(load: Callable[[str], CogVideoXPipeline]) -> CogVideoXPipeline:
    """5b: rotary positions, no temporal patch."""
    return load("5b")


def latents(pipe: CogVideoXPipeline, **options: Any) -> np.ndarray:
    """The video before the VAE, which would only blur what attention did."""
    return render(pipe, steps=STEPS, output_type="latent", **options).numpy()


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / expected.std())


# -- the same pipeline with torch's attention and a token mask -------------------------------------


@contextlib.contextmanager
def defined_attention(
    pipe: CogVideoXPipeline, mask_of: Callable[[int, int], Tensor | None]
) -> Iterator[list[int]]:
    """Runs the DiT's attention with ``mask_of(step, layer)``, bool [1|H, S, S] or None.

    The text encoder calls the same function of torch; it is told by its length.
    """
    sdpa, calls = F.scaled_dot_product_attention, [0]
    layout = layout_of(pipe)

    def masked(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[2] != layout.sequence_length:
            return sdpa(query, key, value, **options)
        step, layer = divmod(calls[0], LAYERS)
        calls[0] += 1
        return sdpa(query, key, value, attn_mask=mask_of(step, layer))

    F.scaled_dot_product_attention = masked
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = sdpa


def token_mask(pipe: CogVideoXPipeline, rule: RadialRule = RULE, **options: Any) -> Tensor:
    """bool [S, S] of the definition, for the sequence [text, video] of ``pipe``."""
    frames, rows, columns = layout_of(pipe).grid
    definition = Definition(
        frames, rows * columns, BLOCK, TEXT, text_first=True, decay=rule.decay_factor,
        neighbor=rule.neighbor_fraction, min_window=rule.min_window, split=rule.split_width,
        sink=rule.sink_frames, **options,
    )  # fmt: skip
    blocks = block_mask(definition)
    tokens = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return tokens[: definition.length, : definition.length]


@pytest.mark.parametrize("model", MODELS)
def test_sparse_video_equals_the_definition(
    load: Callable[[str], CogVideoXPipeline], model: str
) -> None:
    """Two prompts under guidance, a batch of 4: dense first layer, first step and last step."""
    pipe = load(model)
    prompts = ["a cat walks", "rain"]
    tokens = token_mask(pipe)
    assert 0.1 < tokens.double().mean() < 0.8
    dense = latents(pipe, prompt=prompts)

    def mask_of(step: int, layer: int) -> Tensor | None:
        return None if layer == 0 or step in (0, STEPS - 1) else tokens

    with defined_attention(pipe, mask_of) as calls:
        expected = latents(pipe, prompt=prompts)
    assert calls == [STEPS * LAYERS]
    schedule = Schedule(dense_layers=1, dense_first_steps=1, dense_last_steps=1)
    with apply(pipe, rule=RULE, block_size=BLOCK, schedule=schedule) as applied:
        got = latents(pipe, prompt=prompts)
    assert error(got, expected) < 1e-4
    assert error(got, dense) > 1e-2
    assert applied.sparse_calls == (STEPS - 2) * (LAYERS - 1)
    assert applied.dense_calls == STEPS * LAYERS - applied.sparse_calls


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block_size", [BLOCK, 128])
def test_windows_that_cover_everything_give_the_dense_video(
    load: Callable[[str], CogVideoXPipeline], model: str, block_size: int
) -> None:
    pipe = load(model)
    dense = latents(pipe)
    with apply(pipe, rule=EVERYTHING, block_size=block_size) as applied:
        got = latents(pipe)
    assert applied.plan.density() == 1
    assert applied.sparse_calls == STEPS * LAYERS and applied.dense_calls == 0
    assert 0 < error(got, dense) < 1e-4


def test_counts_are_of_calls_that_were_made(
    pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, int]] = []
    attention = integration.attention

    def counted(query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
        calls.append((mask is not None, query.shape[0]))
        return attention(query, key, value, mask, **options)

    monkeypatch.setattr(integration, "attention", counted)
    schedule = Schedule(dense_layers=1, dense_first_steps=2)
    with apply(pipe, rule=RULE, block_size=BLOCK, schedule=schedule) as applied:
        latents(pipe)
        latents(pipe, guidance_scale=1.0)
    sparse = (STEPS - 2) * (LAYERS - 1)
    assert calls == [(True, 2)] * sparse + [(True, 1)] * sparse
    assert applied.sparse_calls == 2 * sparse
    assert applied.dense_calls == 2 * (STEPS * LAYERS - sparse)


def test_undo_restores_the_pipeline_bit_by_bit(pipe: CogVideoXPipeline) -> None:
    dense = latents(pipe)
    processors = dict(pipe.transformer.attn_processors)
    forward = type(pipe.transformer.transformer_blocks[0]).forward
    weights = set(pipe.transformer.state_dict())
    applied = apply(pipe, rule=RULE, block_size=BLOCK, fuse_qkv=True)
    assert applied_to(pipe) is applied
    assert error(latents(pipe), dense) > 1e-2
    assert type(pipe.transformer.transformer_blocks[0]).forward is forward
    applied.undo()
    applied.undo()
    assert applied_to(pipe) is None
    assert pipe.transformer.attn_processors == processors
    assert not pipe.transformer._forward_pre_hooks
    assert set(pipe.transformer.state_dict()) == weights
    assert np.array_equal(latents(pipe), dense)
    with pytest.raises(ZeroDivisionError), apply(pipe, rule=RULE):
        raise ZeroDivisionError
    assert pipe.transformer.attn_processors == processors


def test_dense_layers_and_steps_are_the_pipelines_own(pipe: CogVideoXPipeline) -> None:
    dense = latents(pipe)
    for schedule in (Schedule(dense_layers=LAYERS), Schedule(dense_first_steps=STEPS)):
        with apply(pipe, rule=RULE, block_size=BLOCK, schedule=schedule) as applied:
            assert np.array_equal(latents(pipe), dense)
        assert applied.sparse_calls == 0
    with apply(pipe, rule="dense") as applied:
        assert np.array_equal(latents(pipe), dense)
        assert applied.plan.density() == 1 and applied.dense_calls == STEPS * LAYERS
        assert applied.backend_name() == "none: no layer is sparse"
        assert applied.backend_name(sparse=False) == "the pipeline's own"


def test_overrides_of_layers_and_heads(pipe: CogVideoXPipeline) -> None:
    """Layer 0: dense but for head 1. Layer 1: another rule. Layer 2: the rule, head 0 dense."""
    other = RadialRule(decay_factor=0.05, neighbor_fraction=0.1, split_width=0, min_window=0)
    schedule = Schedule(dense_layers=1, overrides={(0, 1): other, 1: other, (2, 0): "dense"})
    full = torch.ones_like(token_mask(pipe))
    masks = [
        torch.stack([full, token_mask(pipe, other)]),
        token_mask(pipe, other),
        torch.stack([full, token_mask(pipe)]),
    ]
    with defined_attention(pipe, lambda step, layer: masks[layer]):
        expected = latents(pipe)
    with apply(pipe, rule=RULE, block_size=BLOCK, schedule=schedule) as applied:
        assert error(latents(pipe), expected) < 1e-4
        densities = [mask.double().mean().item() for mask in masks]
        assert applied.plan.density() == pytest.approx(np.mean(densities))


# Inside a latent frame of 2b and 5b; between two frames of 1.5 only thanks to its padding.
@pytest.mark.parametrize("model, boundary", [("2b", 7), ("5b", 7), ("1.5", 9)])
@pytest.mark.parametrize("straddle, pick", [("both", set), ("earlier", min), ("later", max)])
def test_scenes_reach_the_mask(
    load: Callable[[str], CogVideoXPipeline], model: str, boundary: int, straddle: str,
    pick: Callable,
) -> None:  # fmt: skip
    """Pixel boundaries, which the model's own times turn into frames of tokens."""
    pipe = load(model)
    boundaries, adjacency = [0, boundary, 17], [[True, False], [True, True]]
    patch = pipe.transformer.config.patch_size_t or 1
    frames = layout_of(pipe).grid[0]
    of_frame = frame_scenes(boundaries, frames, 4, patch, padding=-5 % patch)
    of_frame = [s if straddle == "both" else {pick(s)} for s in of_frame]
    allowed = tuple(map(tuple, allowed_pairs(of_frame, adjacency)))
    tokens = token_mask(pipe, allowed=allowed)
    with defined_attention(pipe, lambda step, layer: tokens):
        expected = latents(pipe)
    scenes = Scenes(boundaries, adjacency, straddle=straddle)
    with apply(pipe, rule=RULE, block_size=BLOCK, scenes=scenes) as applied:
        assert error(latents(pipe), expected) < 1e-4
    assert applied.plan.density() == pytest.approx(tokens.double().mean().item())
    assert not tokens.equal(token_mask(pipe))


def test_two_pipelines_at_once(load: Callable[[str], CogVideoXPipeline]) -> None:
    """Two threads, two models, two rules: each video is the one that it is alone."""
    pipes = [load("2b"), load("5b")]
    settings = [
        {"rule": RULE, "schedule": Schedule(dense_first_steps=1)},
        {"rule": RadialRule(decay_factor=1, split_width=0), "schedule": Schedule(dense_layers=1)},
    ]
    alone = []
    for pipe, setting in zip(pipes, settings, strict=True):
        with apply(pipe, block_size=BLOCK, **setting):
            alone.append(latents(pipe))
    together: list[Any] = [None, None]
    applied = [
        apply(pipe, block_size=BLOCK, **setting)
        for pipe, setting in zip(pipes, settings, strict=True)
    ]

    def run(index: int) -> None:
        together[index] = latents(pipes[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert [a.sparse_calls for a in applied] == [(STEPS - 1) * LAYERS, STEPS * (LAYERS - 1)]
    applied[0].undo()
    assert applied_to(pipes[0]) is None and applied_to(pipes[1]) is applied[1]
    assert np.array_equal(latents(pipes[1]), alone[1])


@pytest.mark.parametrize("what, expected_graphs", [("blocks", 4), ("transformer", 2)])
def test_compile(pipe: CogVideoXPipeline, what: str, expected_graphs: int) -> None:
    """No graph break; a graph for dense steps and one for sparse ones, not one per step or layer.

    The first block gets a strided view where the others get a whole tensor, hence two graphs each.
    """
    schedule = Schedule(dense_first_steps=2)
    torch.compiler.reset()
    with apply(pipe, rule=RULE, block_size=BLOCK, schedule=schedule) as applied:
        eager = latents(pipe)
        transformer = pipe.transformer
        torch._dynamo.utils.counters.clear()
        if what == "blocks":
            for block in transformer.transformer_blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        else:
            pipe.transformer = torch.compile(transformer, backend="aot_eager", fullgraph=True)
        assert applied_to(pipe) is applied
        compiled = latents(pipe)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert error(compiled, eager) < 1e-4
        assert graphs == expected_graphs
        assert applied.sparse_calls == 2 * (STEPS - 2) * LAYERS
    torch.compiler.reset()


def test_model_offload(pipe: CogVideoXPipeline) -> None:
    """accelerate's hooks come and go around ours; here they move the weights to the CPU."""
    schedule = Schedule(dense_first_steps=1)
    with apply(pipe, rule=RULE, block_size=BLOCK, schedule=schedule) as applied:
        expected = latents(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        assert np.array_equal(latents(pipe), expected)
        assert applied.sparse_calls == 2 * (STEPS - 1) * LAYERS
    with apply(pipe, rule=RULE, block_size=BLOCK, schedule=schedule):
        assert np.array_equal(latents(pipe), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [None, "model", "sequential"])
def test_on_a_gpu(pipe: CogVideoXPipeline, gpu: torch.device, offload: str | None) -> None:
    """The video of the CPU, to the rounding of another device; masks follow the tensors."""
    options = {"rule": RULE, "block_size": BLOCK, "schedule": Schedule(dense_first_steps=1)}
    with apply(pipe, **options):
        expected = latents(pipe)
    if offload is None:
        pipe.to(gpu)
    else:
        getattr(pipe, f"enable_{offload}_cpu_offload")(device=gpu)
    with apply(pipe, **options) as applied:
        got = render(pipe, steps=STEPS, output_type="latent").cpu().numpy()
        assert applied.backend_name() != "cpu"
    assert error(got, expected) < 2e-2
    assert applied.sparse_calls == (STEPS - 1) * LAYERS


def test_fused_projections(pipe: CogVideoXPipeline) -> None:
    with apply(pipe, rule=RULE, block_size=BLOCK):
        expected = latents(pipe)
    with apply(pipe, rule=RULE, block_size=BLOCK, fuse_qkv=True):
        inner = pipe.transformer.transformer_blocks[0].attn1.processor.inner
        assert type(inner).__name__ == "FusedCogVideoXAttnProcessor2_0"
        assert hasattr(pipe.transformer.transformer_blocks[0].attn1, "to_qkv")
        assert error(latents(pipe), expected) < 1e-4
    pipe.transformer.fuse_qkv_projections()
    with apply(pipe, rule=RULE, block_size=BLOCK, fuse_qkv=True):
        assert error(latents(pipe), expected) < 1e-4
    assert pipe.transformer.transformer_blocks[0].attn1.fused_projections  # as the user left it


def test_sage_precision_asks_for_kernels_of_that_precision(pipe: CogVideoXPipeline) -> None:
    """Every backend either renders, close to full precision, or says why it cannot."""
    options = {"rule": RULE, "block_size": BLOCK, "schedule": Schedule(dense_first_steps=1)}
    with apply(pipe, **options):
        expected = latents(pipe)
    refused = 0
    for backend in backends():
        with apply(pipe, **options, precision="sage_fp16", backend=backend.name) as applied:
            try:
                assert applied.backend_name() == applied.backend_name(sparse=False) == backend.name
            except RuntimeError as refusal:
                refused += 1
                with pytest.raises(RuntimeError, match=f"backend '{backend.name}', asked for by"):
                    latents(pipe)
                assert "cannot serve" in str(refusal)
                continue
            assert 0 < error(latents(pipe), expected) < 0.5
    assert refused < len(backends())


# -- the documented calls --------------------------------------------------------------------------


def test_the_documented_calls(pipe: CogVideoXPipeline) -> None:
    assert replace_sparse_forward() is None
    first = replace_cogvideox_attention(
        pipe, height=HEIGHT, width=WIDTH, num_frames=FRAMES, dense_layers=2, dense_timesteps=1,
        decay_factor=1.0, sparsity_type="radial", use_sage_attention=True,
    )  # fmt: skip
    assert first.precision == "sage_fp16"
    assert first.plan.rule == RadialRule.for_model("cogvideox", 1.0)
    assert first.plan.schedule == Schedule(dense_layers=2, dense_first_steps=1)
    video = pipe(
        prompt="A beautiful landscape", num_frames=FRAMES, num_inference_steps=2,
        max_sequence_length=TEXT, output_type="np",
    ).frames[0]  # fmt: skip
    assert video.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert first.sparse_calls == 1 and first.dense_calls == 5
    second = replace_cogvideox_attention(pipe, use_sage_attention=True)
    assert applied_to(pipe) is second and second.plan.layout == first.plan.layout
    dense = replace_cogvideox_attention(pipe, HEIGHT, WIDTH, FRAMES, sparsity_type="dense")
    assert dense.plan.density() == 1
    latents(pipe)
    assert dense.sparse_calls == 0 and dense.dense_calls == STEPS * LAYERS
    scenes = replace_cogvideox_attention(pipe, scenes=Scenes([0, 9], "all"))
    assert scenes.plan.scenes.boundaries == (0, 9)
    scenes.undo()
    assert applied_to(pipe) is None


@pytest.mark.parametrize("change, error_type, words", [
    ({"sparsity_type": "svg"}, ValueError, "sparsity_type must be 'radial' or 'dense', got 'svg'"),
    ({"use_sage_attention": 1}, TypeError, "use_sage_attention must be True or False"),
    ({"use_fused_attention": None}, TypeError, "use_fused_attention"),
    ({"decay_factor": 0.0}, ValueError, "decay_factor"),
    ({"dense_layers": 4}, ValueError, "dense_layers must be at most 3, got 4"),
    ({"dense_layers": -1}, ValueError, "dense_layers must be >= 0"),
    ({"dense_timesteps": 1.5}, TypeError, "dense_first_steps must be an int, got 1.5"),
    ({"height": 60}, ValueError, "height must be a positive multiple of 16, got 60"),
    ({"width": 0}, ValueError, "width must be a positive multiple of 16, got 0"),
    ({"num_frames": 0}, ValueError, "num_frames must be a positive"),
    ({"num_frames": 9.0}, TypeError, "num_frames must be an int or None"),
    ({"scenes": Scenes([0, 30], "all")}, ValueError, "within the video of 17 pixel frames"),
    ({"wrong": 1}, TypeError, "wrong"),
])  # fmt: skip
def test_wrong_replacements_are_refused(
    tiny: CogVideoXPipeline, change: dict, error_type: type[Exception], words: str
) -> None:
    with pytest.raises(error_type, match=words):
        replace_cogvideox_attention(tiny, **change)
    assert applied_to(tiny) is None


@pytest.fixture(scope="module")
def tiny() -> CogVideoXPipeline:
    """A pipeline for tests that leave it as it is."""
    return tiny_pipeline(layers=LAYERS)


@pytest.mark.parametrize("change, error_type, words", [
    ({"precision": "int8"}, ValueError, "precision must be one of native"),
    ({"backend": "flash"}, ValueError, "backend must be one of"),
    ({"rule": "radial"}, TypeError, "rule must be 'dense' or a RadialRule, got 'radial'"),
    ({"block_size": 0}, ValueError, "block_size must be >= 1"),
    ({"schedule": 3}, TypeError, "schedule must be a Schedule, got 3"),
    ({"scenes": [0, 9]}, TypeError, "scenes must be a Scenes or None, got list"),
    ({"schedule": Schedule(overrides={3: "dense"})}, ValueError, "3 is not in a model of 3 layers"),
    ({"schedule": Schedule(overrides={(0, 2): RULE})}, ValueError, r"\(0, 2\) is not in a model"),
    ({"fuse_qkv": "yes"}, TypeError, "fuse_qkv must be True or False"),
])  # fmt: skip
def test_wrong_applications_are_refused(
    tiny: CogVideoXPipeline, change: dict, error_type: type[Exception], words: str
) -> None:
    with pytest.raises(error_type, match=words):
        apply(tiny, **change)
    assert applied_to(tiny) is None


@pytest.mark.parametrize("change, error_type, words", [
    ({"dense_layers": True}, TypeError, "dense_layers must be an int, got True"),
    ({"dense_last_steps": -1}, ValueError, "dense_last_steps must be >= 0, got -1"),
    ({"overrides": ["dense"]}, TypeError, "overrides must be a mapping"),
    ({"overrides": {"0": "dense"}}, TypeError, "a key must be layer or"),
    ({"overrides": {(0, 1, 2): "dense"}}, TypeError, "a key must be layer or"),
    ({"overrides": {-1: "dense"}}, TypeError, "a key must be layer or"),
    ({"overrides": {0: "sparse"}}, TypeError, r"overrides\[0\] must be 'dense' or a RadialRule"),
])  # fmt: skip
def test_wrong_schedules_are_refused(change: dict, error_type: type[Exception], words: str) -> None:
    with pytest.raises(error_type, match=words):
        Schedule(**change)


def test_only_pipelines_of_known_models_are_taken() -> None:
    for wrong in (None, SimpleNamespace(transformer=torch.nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="transformer is a CogVideoXTransformer3DModel, got"):
            apply(wrong)


# -- sizes -----------------------------------------------------------------------------------------


@dataclass
class Config:
    sample_height: int = 60
    sample_width: int = 90
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    max_text_seq_length: int = 226


@dataclass
class Sizes:
    """What a real pipeline says of its sizes."""

    config: Config = field(default_factory=Config)
    vae_scale_factor_spatial: int = 8
    vae_scale_factor_temporal: int = 4

    @property
    def transformer(self) -> Any:
        return SimpleNamespace(config=self.config)


COGVIDEOX = Sizes()
COGVIDEOX_1_5 = Sizes(Config(96, 170, 81, patch_size_t=2))


@pytest.mark.parametrize("sizes, given, grid, length", [
    (COGVIDEOX, (None, None, None), (13, 30, 45), 17776),
    (COGVIDEOX, (480, 720, 49), (13, 30, 45), 17776),
    (COGVIDEOX, (480, 720, 48), (12, 30, 45), 16426),
    (COGVIDEOX, (480, 720, 1), (1, 30, 45), 1576),
    (COGVIDEOX, (256, 384, 9), (3, 16, 24), 1378),
    (COGVIDEOX_1_5, (None, None, None), (11, 48, 85), 45106),
    (COGVIDEOX_1_5, (768, 1360, 161), (21, 48, 85), 85906),
    (COGVIDEOX_1_5, (768, 1360, 85), (11, 48, 85), 45106),
])  # fmt: skip
def test_grids_of_the_real_models(sizes: Sizes, given: tuple, grid: tuple, length: int) -> None:
    layout = layout_of(sizes, *given)
    assert layout.grid == grid and layout.sequence_length == length
    assert layout.text_first and layout.text_length == 226


@pytest.mark.parametrize("call, numbers", [
    ({"num_frames": 9}, ("76 tokens .16 text and 3 x 4 x 5 video", "116 tokens")),
    ({"height": 96}, ("166 tokens .16 text and 5 x 6 x 5 video", "5 x 4 x 5 video")),
    ({"width": 64, "height": 80}, ("5 x 5 x 4 video", "5 x 4 x 5 video")),
])  # fmt: skip
def test_another_size_than_applied_for_raises_with_both(
    tiny: CogVideoXPipeline, call: dict, numbers: tuple[str, str]
) -> None:
    schedule = Schedule(dense_layers=LAYERS)  # even where no layer would be sparse
    with apply(tiny, schedule=schedule), pytest.raises(ValueError, match=".*".join(numbers)):
        latents(tiny, **call)


def test_another_text_length_raises() -> None:
    pipe = tiny_pipeline(rotary=True)
    with apply(pipe), pytest.raises(ValueError, match="112 tokens .12 text.*116 tokens .16 text"):
        latents(pipe, max_sequence_length=12)


# -- the parts -------------------------------------------------------------------------------------


def test_steps_by_timestep() -> None:
    scheduler = SimpleNamespace(timesteps=torch.tensor([999, 749, 500, 250, 1]))
    for step, timestep in enumerate([999, 749, 500, 250, 1]):
        for given in (timestep, float(timestep), torch.tensor([timestep] * 2)):
            assert denoising_step(scheduler, given) == (step, 5)
    assert denoising_step(scheduler, torch.tensor(999).bfloat16()) == (0, 5)
    with pytest.raises(ValueError, match=r"timestep 600\.0 is none of the scheduler's 5 timesteps"):
        denoising_step(scheduler, 600)


def test_a_foreign_timestep_raises_only_where_steps_matter(tiny: CogVideoXPipeline) -> None:
    tiny.scheduler.set_timesteps(4)
    inputs = {
        "hidden_states": torch.zeros(1, 5, 4, HEIGHT // 8, WIDTH // 8),
        "encoder_hidden_states": torch.zeros(1, TEXT, 32),
        "timestep": torch.tensor([600]),
    }
    with apply(tiny, rule=RULE, block_size=BLOCK) as applied, torch.no_grad():
        tiny.transformer(**inputs)
        tiny.transformer(*inputs.values())
        assert applied.sparse_calls == 2 * LAYERS
    with (
        apply(tiny, schedule=Schedule(dense_last_steps=1)),
        pytest.raises(ValueError, match="timestep 600"),
    ):
        tiny.transformer(**inputs)


def test_one_application_at_a_time(tiny: CogVideoXPipeline) -> None:
    with apply(tiny), pytest.raises(RuntimeError, match="applied already: call undo"):
        apply(tiny)
    assert applied_to(tiny) is None


def test_processors_replaced_behind_our_back_are_noticed() -> None:
    pipe = tiny_pipeline(layers=LAYERS)
    with apply(pipe):
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match="processor of layer 0 was replaced after apply"):
            latents(pipe)
    # undo() leaves alone what is not ours.
    names = {type(p).__name__ for p in pipe.transformer.attn_processors.values()}
    assert names == {"FusedCogVideoXAttnProcessor2_0"}


def test_the_processor_alone(tiny: CogVideoXPipeline) -> None:
    """As a diffusers processor, set by hand on one layer."""
    attn = tiny.transformer.transformer_blocks[0].attn1
    video, text = torch.randn(2, 100, 32), torch.randn(2, TEXT, 32)
    before = attn.processor
    dense = attn(hidden_states=video, encoder_hidden_states=text)
    tokens = token_mask(tiny)
    try:
        attn.set_processor(CogVideoXSparseAttnProcessor2_0())
        same = attn(hidden_states=video, encoder_hidden_states=text)
        assert all(torch.equal(a, b) for a, b in zip(same, dense, strict=True))
        with apply(tiny, rule=RULE, block_size=BLOCK) as applied:
            mask = applied.plan.layer_masks("cpu")[0]
        attn.set_processor(CogVideoXSparseAttnProcessor2_0(mask))
        sparse = attn(hidden_states=video, encoder_hidden_states=text)
        attn.set_processor(before)
        with defined_attention(tiny, lambda step, layer: tokens):
            expected = attn(hidden_states=video, encoder_hidden_states=text)
        for a, b in zip(sparse, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    finally:
        attn.set_processor(before)


def test_an_attention_that_is_not_reached_raises() -> None:
    def flash(attn: Any, video: Tensor, text: Tensor, mask: Any, rotary: Any) -> tuple:
        return video, text

    processor = CogVideoXSparseAttnProcessor2_0(inner=flash, precision="sage_fp16")
    with pytest.raises(RuntimeError, match="flash did not call scaled_dot_product_attention"):
        processor(None, torch.zeros(1, 4, 8), torch.zeros(1, 2, 8))


@pytest.mark.parametrize("options, name", [
    ({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, "attn_mask"),
    ({"dropout_p": 0.1}, "dropout_p"),
    ({"is_causal": True}, "is_causal"),
])  # fmt: skip
def test_attention_that_asks_for_more_is_refused(options: dict, name: str) -> None:
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=f"cannot serve a call with {name}"):
        call_with_attention(
            lambda q, k, v, scale: v, lambda: F.scaled_dot_product_attention(x, x, x, **options)
        )


def test_attention_is_replaced_in_its_thread_and_gets_the_scale() -> None:
    x = torch.randn(1, 2, 4, 8)
    scales: list[float | None] = []
    elsewhere: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        scales.append(scale)
        return torch.zeros_like(value)

    def model(scale: float | None) -> Tensor:
        other = threading.Thread(
            target=lambda: elsewhere.append(F.scaled_dot_product_attention(x, x, x))
        )
        other.start()
        other.join()
        return F.scaled_dot_product_attention(x, x, x, scale=scale)

    for scale in (0.5, None):
        assert call_with_attention(attend, model, scale).count_nonzero() == 0
    assert scales == [0.5, None]
    assert all(out.count_nonzero() > 0 for out in elsewhere) and len(elsewhere) == 2
    assert F.scaled_dot_product_attention(x, x, x).count_nonzero() > 0


def test_diffusers_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    for call in (replace_sparse_forward, CogVideoXSparseAttnProcessor2_0):
        with pytest.raises(ImportError, match=r"pip install 'video-attn\[diffusers\]'"):
            call()


# -- the example -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path(__file__).parents[1] / "examples" / "cogvideox_t2v_inference.py"
    spec = importlib.util.spec_from_file_location("cogvideox_t2v_inference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(
    example: Any, capsys: pytest.CaptureFixture, output: Path, arguments: list[str]
) -> str:
    """What it printed; the video must be there and have the right size."""
    common = ["--num_inference_steps", "4", "--dtype", "float32", "--output_file", str(output)]
    assert example.main([*arguments, *common]) == 0
    with av.open(str(output)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == FRAMES and frames[0].shape == (HEIGHT, WIDTH, 3)
    return " ".join(capsys.readouterr().out.split())


def test_example(
    example: Any, capsys: pytest.CaptureFixture, folders: dict[str, Path], tmp_path: Path
) -> None:
    documented = [
        "--model_id", str(folders["2b"]), "--prompt", "A cat", "--pattern", "radial",
        "--dense_layers", "2", "--dense_timesteps", "1", "--decay_factor", "1.0",
        "--use_sage_attention", "--enable_model_cpu_offload",
    ]  # fmt: skip
    printed = run_example(example, capsys, tmp_path / "a.mp4", documented)
    assert "radial attention over 116 tokens: 16 text, 5 x 4 x 5 video" in printed
    assert "precision sage_fp16" in printed and "4/4" in printed
    assert "3 sparse and 9 dense attention calls" in printed
    assert "s per step" in printed and "density of a sparse step" in printed


@pytest.mark.parametrize("arguments, sparse, dense", [
    (["--preset", "short"], 2, 10),
    (["--preset", "short", "--dense_layers", "0", "--use_fused_attention"], 3, 9),
    (["--preset", "long"], 0, 12),
    (["--preset", "low_memory", "--dense_timesteps", "0"], 4, 8),
    (["--pattern", "dense", "--enable_sequential_cpu_offload"], 0, 12),
    (["--scene_boundaries", "0,7,17", "--scene_adjacency", "10,11", "--dense_timesteps", "3"],
     1, 11),
])  # fmt: skip
def test_example_presets_and_scenes(
    example: Any, capsys: pytest.CaptureFixture, folders: dict[str, Path], tmp_path: Path,
    arguments: list[str], sparse: int, dense: int,
) -> None:  # fmt: skip
    model = ["--model_id", str(folders["1.5"]), "--height", str(HEIGHT), "--width", str(WIDTH)]
    printed = run_example(example, capsys, tmp_path / "b.mp4", [*model, *arguments])
    assert f"{sparse} sparse and {dense} dense attention calls" in printed


@pytest.mark.parametrize("arguments", [
    ["--pattern", "svg"], ["--preset", "best"], ["--dense_layer", "2"],
    ["--scene_boundaries", "0,x"], ["--scene_adjacency", "12,21"],
    ["--enable_model_cpu_offload", "--enable_sequential_cpu_offload"],
])  # fmt: skip
def test_wrong_options_of_the_example(example: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.parse(arguments)


# -- the page --------------------------------------------------------------------------------------


def test_python_of_the_page_runs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/radial.md from top to bottom, its model and sizes replaced by tiny ones."""
    page = (Path(__file__).parents[1] / "docs" / "radial.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    tiny = {
        "THUDM/CogVideoX-2b": str(folders["2b"]), "bfloat16": "float32",
        "height=480": f"height={HEIGHT}", "width=720": f"width={WIDTH}",
        "num_frames=49": f"num_frames={FRAMES}", "7: ": "1: ", "(9, 3)": "(2, 1)",
    }  # fmt: skip

    class ShortPipeline(CogVideoXPipeline):
        def __call__(self, **options: Any) -> Any:
            return super().__call__(
                max_sequence_length=TEXT, num_inference_steps=9, output_type="np", **options
            )

    monkeypatch.setattr("diffusers.CogVideoXPipeline", ShortPipeline)
    names: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        for old, new in tiny.items() if number < 2 else ():
            snippet = snippet.replace(old, new)
        exec(compile(snippet, f"docs/radial.md, snippet {number}", "exec"), names)
        if number < 2:
            assert names["video"].shape == (FRAMES, HEIGHT, WIDTH, 3)
        else:
            assert names["out"].isfinite().all() and names["mask"].density() < 1
    assert names["handle"].sparse_calls == 2  # 9 - 5 - 2 steps, the last of 3 layers
