"""What the pipeline integration refuses, the sizes it derives, and its parts."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_cogvideox import (
    BLOCK,
    FRAMES,
    HEIGHT,
    LAYERS,
    RULE,
    TEXT,
    WIDTH,
    CogVideoXPipeline,
    defined_attention,
    latents,
    tiny_pipeline,
    token_mask,
)
from torch import Tensor
from torch.nn import functional as F

from radial_attn.models.cogvideox import (
    CogVideoXSparseAttnProcessor2_0,
    replace_cogvideox_attention,
    replace_sparse_forward,
)
from video_attn import Radial, SlidingTile, VideoTokens
from video_attn.integrations import Schedule, applied_to, apply
from video_attn.integrations.attention_call import AttentionCall
from video_attn.integrations.cogvideox import layout_of
from video_attn.integrations.intercept import call_with_attention
from video_attn.integrations.steps import denoising_step
from video_attn.patterns.scene import Scenes


@pytest.fixture(scope="module")
def tiny() -> CogVideoXPipeline:
    """A pipeline for tests that leave it as it is."""
    return tiny_pipeline(layers=LAYERS)


@pytest.mark.parametrize("change, error_type, words", [
    ({"sparsity_type": "svg"}, ValueError, "sparsity_type must be 'radial' or 'dense', got 'svg'"),
    ({"use_sage_attention": 1}, TypeError, "use_sage_attention must be True or False"),
    ({"use_fused_attention": None}, TypeError, "use_fused_attention"),
    ({"decay_factor": 0.0}, ValueError, "decay_factor"),
    ({"dense_layers": 4}, ValueError, "dense_layers must be at most 3, got 4"),
    ({"dense_layers": -1}, ValueError, "dense_layers must be >= 0"),
    ({"dense_timesteps": 1.5}, ValueError, "dense_first_steps must be an int, or a share"),
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


@pytest.mark.parametrize("change, error_type, words", [
    ({"precision": "int8"}, ValueError, "precision must be one of native"),
    ({"backend": "flash"}, ValueError, "backend must be one of"),
    ({"pattern": "radial"}, TypeError, "pattern must be a SlidingTile, .* or Dense, got str"),
    ({"pattern": SlidingTile([(1, 1, 1)] * 3)}, ValueError, "window must be one .* head .2."),
    ({"schedule": 3}, TypeError, "schedule must be a Schedule or None, got 3"),
    ({"schedule": Schedule(overrides={3: "dense"})}, ValueError, "3 is not in a model of 3 layers"),
    ({"schedule": Schedule(overrides={(0, 2): RULE})}, ValueError, r"\(0, 2\) is not in a model"),
    ({"fuse_qkv": "yes"}, TypeError, "fuse_qkv must be True or False"),
])  # fmt: skip
def test_wrong_applications_are_refused(
    tiny: CogVideoXPipeline, change: dict, error_type: type[Exception], words: str
) -> None:
    with pytest.raises(error_type, match=words):
        apply(tiny, **({"pattern": Radial()} | change))
    assert applied_to(tiny) is None


@pytest.mark.parametrize("change, error_type, words", [
    ({"dense_layers": True}, TypeError, "dense_layers must be an int, got True"),
    ({"dense_last_steps": -1}, ValueError, "dense_last_steps must be >= 0, got -1"),
    ({"overrides": ["dense"]}, TypeError, "overrides must be a mapping"),
    ({"overrides": {"0": "dense"}}, TypeError, "a key must be layer or"),
    ({"overrides": {(0, 1, 2): "dense"}}, TypeError, "a key must be layer or"),
    ({"overrides": {-1: "dense"}}, TypeError, "a key must be layer or"),
    ({"overrides": {0: "sparse"}}, TypeError, r"overrides\[0\] must be 'dense', a pattern or a"),
])  # fmt: skip
def test_wrong_schedules_are_refused(change: dict, error_type: type[Exception], words: str) -> None:
    with pytest.raises(error_type, match=words):
        Schedule(**change)


def test_only_pipelines_of_known_models_are_taken() -> None:
    for wrong in (None, SimpleNamespace(transformer=torch.nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="pipe must be a diffusers pipeline, or its transf"):
            apply(wrong, Radial())


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
    ({"num_frames": 9}, ("3 x 4 x 5", "5 x 4 x any")),
    ({"height": 96}, ("5 x 6 x 5", "5 x 4 x any")),
])  # fmt: skip
def test_another_size_than_applied_for_raises_with_both(
    tiny: CogVideoXPipeline, call: dict, numbers: tuple[str, str]
) -> None:
    handle = replace_cogvideox_attention(
        tiny, height=HEIGHT, num_frames=FRAMES, dense_layers=LAYERS
    )
    with handle, pytest.raises(ValueError, match=".*".join(numbers)):
        latents(tiny, **call)


# -- the parts -------------------------------------------------------------------------------------


def test_steps_by_timestep() -> None:
    """Heun's timesteps come twice; the largest of timesteps per token is the step's."""
    other = object()
    timesteps = [999, 749, 749, 500, 500, 250, 250, 1]
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor(timesteps)))
    for source in ({"pipe": pipe}, {"timesteps": timesteps}):
        for step, timestep in enumerate([999, 749, 500, 250, 1]):
            for given in (timestep, float(timestep), torch.tensor([[0, timestep]] * 2)):
                assert denoising_step(other, given, **source) == (step, 5)
        assert denoising_step(other, torch.tensor(999).bfloat16(), **source) == (0, 5)
        with pytest.raises(ValueError, match=r"timestep 600\.0 is none of the 5 timesteps"):
            denoising_step(other, 600, **source)
    with pytest.raises(ValueError, match="give timesteps= to apply"):
        denoising_step(other, 600)


def test_a_foreign_timestep_raises_only_where_steps_matter(tiny: CogVideoXPipeline) -> None:
    tiny.scheduler.set_timesteps(4)
    inputs = {
        "hidden_states": torch.zeros(1, 5, 4, HEIGHT // 8, WIDTH // 8),
        "encoder_hidden_states": torch.zeros(1, TEXT, 32),
        "timestep": torch.tensor([600]),
    }
    with apply(tiny, Radial(RULE, BLOCK)) as applied, torch.no_grad():
        tiny.transformer(**inputs)
        tiny.transformer(*inputs.values())
        assert applied.sparse_calls == 2 * LAYERS
    with (
        apply(tiny, Radial(), schedule=Schedule(dense_last_steps=1)),
        pytest.raises(ValueError, match="timestep 600"),
    ):
        tiny.transformer(**inputs)


def test_one_application_at_a_time(tiny: CogVideoXPipeline) -> None:
    with apply(tiny, Radial()), pytest.raises(RuntimeError, match="applied already: call undo"):
        apply(tiny, Radial())
    assert applied_to(tiny) is None


def test_processors_replaced_behind_our_back_are_noticed() -> None:
    pipe = tiny_pipeline(layers=LAYERS)
    with apply(pipe, Radial()):
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match="transformer_blocks.0.attn1 was replaced after"):
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
        with apply(tiny, Radial(RULE, BLOCK)) as applied:
            mask = applied.pattern.mask(VideoTokens((5, 4, 5), TEXT, text_first=True))
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
            AttentionCall.refuse_more, lambda: F.scaled_dot_product_attention(x, x, x, **options)
        )


def test_attention_is_replaced_in_its_thread_and_gets_the_scale() -> None:
    x = torch.randn(1, 2, 4, 8)
    scales: list[float | None] = []
    elsewhere: list[Tensor] = []

    def attend(call: AttentionCall) -> Tensor:
        scales.append(call.scale)
        return torch.zeros_like(call.dense())

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
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    for call in (replace_sparse_forward, CogVideoXSparseAttnProcessor2_0):
        with pytest.raises(ImportError, match=r"pip install 'video-attn\[diffusers\]'"):
            call()
