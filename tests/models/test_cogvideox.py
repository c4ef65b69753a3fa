"""A whole CogVideoX pipeline with radial attention: tiny random weights, the real code around them.

What it computes is compared with the same pipeline under torch's attention and a token mask made
from the definition; what it leaves behind, with the same pipeline before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from radial_oracle import allowed_pairs, frame_scenes
from tiny_cogvideox import (
    BLOCK,
    EVERYTHING,
    FRAMES,
    HEIGHT,
    LAYERS,
    MODELS,
    RULE,
    STEPS,
    TEXT,
    WIDTH,
    CogVideoXPipeline,
    defined_attention,
    error,
    latents,
    load,
    render,
    token_mask,
)
from torch import Tensor

from radial_attn.models.cogvideox import (
    replace_cogvideox_attention,
    replace_sparse_forward,
)
from video_attn import Dense, Radial
from video_attn.functional import patterns
from video_attn.integrations import Schedule, applied_to, apply
from video_attn.integrations.cogvideox import layout_of
from video_attn.patterns.radial import RadialRule
from video_attn.patterns.scene import Scenes
from video_attn.registry import backends


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    """A pipeline to change."""
    return load()


@pytest.mark.parametrize("model", MODELS)
def test_sparse_video_equals_the_definition(model: str) -> None:
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
    with apply(pipe, Radial(RULE, BLOCK), schedule=schedule) as applied:
        got = latents(pipe, prompt=prompts)
    assert error(got, expected) < 1e-4
    assert error(got, dense) > 1e-2
    assert applied.sparse_calls == (STEPS - 2) * (LAYERS - 1)
    assert applied.dense_calls == STEPS * LAYERS - applied.sparse_calls


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block_size", [BLOCK, 128])
def test_windows_that_cover_everything_give_the_dense_video(model: str, block_size: int) -> None:
    pipe = load(model)
    dense = latents(pipe)
    with apply(pipe, Radial(EVERYTHING, block_size)) as applied:
        got = latents(pipe)
    assert applied.density() == 1
    assert applied.sparse_calls == STEPS * LAYERS and applied.dense_calls == 0
    assert 0 < error(got, dense) < 1e-4


def test_counts_are_of_calls_that_were_made(
    pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[bool, int]] = []
    attention = patterns.attention

    def counted(query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
        calls.append((mask is not None, query.shape[0]))
        return attention(query, key, value, mask, **options)

    monkeypatch.setattr(patterns, "attention", counted)
    schedule = Schedule(dense_layers=1, dense_first_steps=2)
    with apply(pipe, Radial(RULE, BLOCK), schedule=schedule) as applied:
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
    applied = apply(pipe, Radial(RULE, BLOCK), fuse_qkv=True)
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
    with pytest.raises(ZeroDivisionError), apply(pipe, Radial(RULE)):
        raise ZeroDivisionError
    assert pipe.transformer.attn_processors == processors


def test_dense_layers_and_steps_are_the_pipelines_own(pipe: CogVideoXPipeline) -> None:
    dense = latents(pipe)
    with apply(pipe, Radial(RULE, BLOCK), schedule=Schedule(dense_layers=LAYERS)) as applied:
        assert np.array_equal(latents(pipe), dense)
    assert applied.sparse_calls == 0
    schedule = Schedule(dense_first_steps=STEPS)
    with (
        apply(pipe, Radial(RULE, BLOCK), schedule=schedule) as applied,
        pytest.warns(UserWarning, match=f"all {STEPS} steps of this run are dense"),
    ):
        assert np.array_equal(latents(pipe), dense)
    assert applied.sparse_calls == 0
    with apply(pipe, Dense()) as applied:
        assert np.array_equal(latents(pipe), dense)
        assert applied.density() == 1 and applied.dense_calls == STEPS * LAYERS
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
    with apply(pipe, Radial(RULE, BLOCK), schedule=schedule) as applied:
        assert error(latents(pipe), expected) < 1e-4
        densities = [mask.double().mean().item() for mask in masks]
        assert applied.density() == pytest.approx(np.mean(densities))


# Inside a latent frame of 2b and 5b; between two frames of 1.5 only thanks to its padding.
@pytest.mark.parametrize("model, boundary", [("2b", 7), ("5b", 7), ("1.5", 9)])
@pytest.mark.parametrize("straddle, pick", [("both", set), ("earlier", min), ("later", max)])
def test_scenes_reach_the_mask(
    model: str, boundary: int, straddle: str,
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
    with apply(pipe, Radial(RULE, BLOCK, scenes)) as applied:
        assert error(latents(pipe), expected) < 1e-4
    assert applied.density() == pytest.approx(tokens.double().mean().item())
    assert not tokens.equal(token_mask(pipe))


def test_two_pipelines_at_once() -> None:
    """Two threads, two models, two rules: each video is the one that it is alone."""
    pipes = [load("2b"), load("5b")]
    settings = [
        {"pattern": Radial(RULE, BLOCK), "schedule": Schedule(dense_first_steps=1)},
        {
            "pattern": Radial(RadialRule(decay_factor=1, split_width=0), BLOCK),
            "schedule": Schedule(dense_layers=1),
        },
    ]
    alone = []
    for pipe, setting in zip(pipes, settings, strict=True):
        with apply(pipe, **setting):
            alone.append(latents(pipe))
    together: list[Any] = [None, None]
    applied = [apply(pipe, **setting) for pipe, setting in zip(pipes, settings, strict=True)]

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


def test_compiled_blocks(pipe: CogVideoXPipeline) -> None:
    """No graph break, and one graph for dense and sparse steps and all layers.

    The first block gets a strided view where the others get a whole tensor, hence two.
    """
    schedule = Schedule(dense_first_steps=2)
    torch.compiler.reset()
    with apply(pipe, Radial(RULE, BLOCK), schedule=schedule) as applied:
        eager = latents(pipe)
        torch._dynamo.utils.counters.clear()
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
        compiled = latents(pipe)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert error(compiled, eager) < 1e-4
        assert graphs == 2
        assert applied.sparse_calls == 2 * (STEPS - 2) * LAYERS
    torch.compiler.reset()


def test_model_offload(pipe: CogVideoXPipeline) -> None:
    """accelerate's hooks come and go around ours; here they move the weights to the CPU."""
    schedule = Schedule(dense_first_steps=1)
    with apply(pipe, Radial(RULE, BLOCK), schedule=schedule) as applied:
        expected = latents(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        assert np.array_equal(latents(pipe), expected)
        assert applied.sparse_calls == 2 * (STEPS - 1) * LAYERS
    with apply(pipe, Radial(RULE, BLOCK), schedule=schedule):
        assert np.array_equal(latents(pipe), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [None, "model", "sequential"])
def test_on_a_gpu(pipe: CogVideoXPipeline, gpu: torch.device, offload: str | None) -> None:
    """The video of the CPU, to the rounding of another device; masks follow the tensors."""
    options = {"pattern": Radial(RULE, BLOCK), "schedule": Schedule(dense_first_steps=1)}
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
    with apply(pipe, Radial(RULE, BLOCK)):
        expected = latents(pipe)
    with apply(pipe, Radial(RULE, BLOCK), fuse_qkv=True):
        inner = pipe.transformer.transformer_blocks[0].attn1.processor.before
        assert type(inner).__name__ == "FusedCogVideoXAttnProcessor2_0"
        assert hasattr(pipe.transformer.transformer_blocks[0].attn1, "to_qkv")
        assert error(latents(pipe), expected) < 1e-4
    pipe.transformer.fuse_qkv_projections()
    with apply(pipe, Radial(RULE, BLOCK), fuse_qkv=True):
        assert error(latents(pipe), expected) < 1e-4
    assert pipe.transformer.transformer_blocks[0].attn1.fused_projections  # as the user left it


def test_sage_precision_asks_for_kernels_of_that_precision(pipe: CogVideoXPipeline) -> None:
    """Every backend either renders, close to full precision, or says why it cannot."""
    options = {"pattern": Radial(RULE, BLOCK), "schedule": Schedule(dense_first_steps=1)}
    with apply(pipe, **options):
        expected = latents(pipe)
    refused = 0
    for backend in backends():
        if backend.name == "triton":
            continue  # a pipeline takes minutes in the interpreter
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
    assert first.pattern == Radial(RadialRule.for_model("cogvideox", 1.0))
    assert first.schedule == Schedule(dense_layers=2, dense_first_steps=1)
    video = pipe(
        prompt="A beautiful landscape", num_frames=FRAMES, num_inference_steps=2,
        max_sequence_length=TEXT, output_type="np",
    ).frames[0]  # fmt: skip
    assert video.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert first.sparse_calls == 1 and first.dense_calls == 5
    second = replace_cogvideox_attention(pipe, use_sage_attention=True)
    assert applied_to(pipe) is second
    dense = replace_cogvideox_attention(pipe, HEIGHT, WIDTH, FRAMES, sparsity_type="dense")
    assert dense.density((5, 4, 5)) == 1
    latents(pipe)
    assert dense.sparse_calls == 0 and dense.dense_calls == STEPS * LAYERS
    scenes = replace_cogvideox_attention(pipe, scenes=Scenes([0, 9], "all"))
    assert scenes.pattern.scenes.boundaries == (0, 9)
    scenes.undo()
    assert applied_to(pipe) is None
