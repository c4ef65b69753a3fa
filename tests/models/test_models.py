"""apply() on every family of models: what it computes, counts and leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import MODELS, Tiny, output, random
from token_masks import raster_coordinates, sliding_tile_tokens
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from video_attn import Dense, Radial, RadialRule, SlidingTile, VideoSparse, VideoTokens
from video_attn.integrations import Schedule, applied_to, apply
from video_attn.integrations.attention_call import AttentionCall
from video_attn.integrations.intercept import replace_processor
from video_attn.integrations.models import FAMILIES, family_of

TILE, WINDOW = (2, 2, 2), (1, 1, 2)
EVERYTHING = {
    "sliding_tile": SlidingTile((9, 9, 9), TILE),
    "video_sparse": VideoSparse(top_k_ratio=1.0, tile=TILE),
    "radial": Radial(RadialRule(decay_factor=1e6, split_width=0), block_size=8),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """One model of each family, made when it is asked for; tests leave them as they are."""
    return {}


def made(models: dict[str, Any], name: str) -> tuple[Tiny, Any]:
    if name not in models:
        models[name] = MODELS[name].model()
    return MODELS[name], models[name]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.std())


def test_every_class_of_every_family_has_a_tiny_model() -> None:
    assert {tiny.kind for tiny in MODELS.values()} == {
        kind for family in FAMILIES for kind in family.transformers
    }


@pytest.mark.parametrize("name", MODELS)
def test_sliding_tile_is_its_definition(models: dict[str, Any], name: str) -> None:
    """Two prompts of different length, ragged tiles; against torch and a mask of tokens."""
    tiny, model = made(models, name)
    inputs = tiny.inputs(2)
    dense = output(model, inputs)
    with apply(model, SlidingTile(WINDOW, TILE)) as applied:
        got = output(model, inputs)
        assert applied.sparse_calls == tiny.layers and applied.dense_calls == 0
        assert 0 < applied.density() < 0.9
    expected = defined(tiny, model, inputs)
    assert error(got, expected) < 1e-4
    assert error(got, dense) > 1e-3
    assert torch.equal(output(model, inputs), dense)


def defined(tiny: Tiny, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The same by torch's attention and a mask [B, 1, S, S] of what each token may see."""
    video = sliding_tile_tokens(raster_coordinates(tiny.grid), tiny.grid, TILE, [WINDOW])
    video = video.reshape(video.shape[-2:])

    def attend(call: AttentionCall) -> Tensor:
        batch, length = call.query.shape[0], call.query.shape[2]
        text = length - video.shape[0]
        keep = torch.ones(batch, 1, length, length, dtype=torch.bool)
        if tiny.text_first:
            keep[:, :, text:, text:] = video
        else:
            keep[:, :, : length - text, : length - text] = video
            if text == tiny.text and tiny.valid is not None:
                for item, valid in enumerate(tiny.valid[:batch]):
                    keep[item, :, :, length - text + valid :] = False
        return F.scaled_dot_product_attention(call.query, call.key, call.value, attn_mask=keep)

    layers = family_of(model).attention_layers(model)
    processors = [replace_processor(layer.module, attend) for layer in layers]
    try:
        return output(model, inputs)
    finally:
        for processor in processors:
            processor.undo()


@pytest.mark.parametrize("pattern", EVERYTHING)
@pytest.mark.parametrize("name", MODELS)
def test_a_pattern_over_everything_is_dense(
    models: dict[str, Any], name: str, pattern: str
) -> None:
    tiny, model = made(models, name)
    inputs = tiny.inputs(2)
    dense = output(model, inputs)
    schedule = Schedule(dense_layers=1)
    with apply(model, EVERYTHING[pattern], schedule=schedule) as applied:
        got = output(model, inputs)
        assert applied.density() == 1
    assert error(got, dense) < 1e-4
    first = sum(layer.layer == 0 for layer in family_of(model).attention_layers(model))
    assert (applied.sparse_calls, applied.dense_calls) == (tiny.layers - first, first)
    assert applied_to(model) is None and not model._forward_pre_hooks and not model._forward_hooks
    assert torch.equal(output(model, inputs), dense)


def test_control_blocks_of_vace_share_the_number_of_the_block_they_feed(
    models: dict[str, Any],
) -> None:
    tiny, model = made(models, "vace")
    layers = family_of(model).attention_layers(model)
    assert [layer.layer for layer in layers] == [0, 1, 2, 0, 2]
    assert [layer.name for layer in layers[2:4]] == ["blocks.2.attn1", "vace_blocks.0.attn1"]
    with apply(model, SlidingTile(WINDOW, TILE), schedule=Schedule(dense_layers=2)) as applied:
        output(model, tiny.inputs(1))
    assert (applied.sparse_calls, applied.dense_calls) == (2, 3)


def test_attention_that_is_replaced_already_is_refused(models: dict[str, Any]) -> None:
    """By sparsify(), say; nothing is changed then."""
    _, model = made(models, "wan")
    processor = replace_processor(model.blocks[1].attn1, AttentionCall.dense)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn1 is replaced already"):
        apply(model, Dense(), fuse_qkv=True)
    assert applied_to(model) is None and not hasattr(model.blocks[0].attn1, "to_qkv")
    processor.undo()
    apply(model, Dense()).undo()


class LargestMask(TorchDispatchMode):
    """The elements of the largest boolean tensor that is made, in memory."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.bool and not out.is_meta:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_mask_of_all_pairs_in_hunyuan_1_5(models: dict[str, Any]) -> None:
    """diffusers makes one for every layer: 12.5 GB at 720p. Dense layers do without it too."""
    tiny, model = made(models, "hunyuan15")
    inputs, length = tiny.inputs(2), 60 + tiny.text
    with LargestMask() as largest:
        output(model, inputs)
    assert largest.elements >= 2 * length**2
    for pattern in (SlidingTile(WINDOW, TILE), Dense()):
        with apply(model, pattern):
            output(model, inputs)  # the lists of blocks are made once
            with LargestMask() as largest:
                output(model, inputs)
        assert largest.elements < length**2


def test_an_image_of_hunyuan_1_5_is_valid(models: dict[str, Any]) -> None:
    tiny, model = made(models, "hunyuan15")
    inputs = tiny.inputs(2) | {"image_embeds": torch.ones(2, 3, 12)}
    dense = output(model, inputs)
    with apply(model, EVERYTHING["sliding_tile"]):
        assert error(output(model, inputs), dense) < 1e-4


def test_condition_tokens_of_ltx(models: dict[str, Any]) -> None:
    """LTX-Video: before the video, whose grid the coordinates tell; LTX-2: after it."""
    _, model = made(models, "ltx")
    inputs = MODELS["ltx"].inputs(1)
    for name in ("num_frames", "height", "width"):
        del inputs[name]
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in (3, 4, 5)), indexing="ij")
    video = torch.stack([t, h, w]).flatten(1).float()
    condition = video[:, :20] + torch.tensor([[1.0], [0], [0]])  # a frame at time 1
    inputs["hidden_states"] = random(1, 80, 8)
    inputs["video_coords"] = torch.cat([condition, video], 1)[None]
    dense = output(model, inputs)
    with apply(model, EVERYTHING["sliding_tile"]):
        assert error(output(model, inputs), dense) < 1e-4
    with apply(model, SlidingTile(WINDOW, TILE)) as applied:
        assert error(output(model, inputs), dense) > 1e-3
        assert applied.last_tokens == VideoTokens((3, 4, 5), 20, text_first=True)
    del inputs["video_coords"]
    with apply(model, Dense()), pytest.raises(ValueError, match="without num_frames, height and"):
        output(model, inputs)

    tiny, model = made(models, "ltx2")
    inputs = tiny.inputs(1)
    inputs["hidden_states"] = random(1, 66, 4)
    coordinates = model.rope.prepare_video_coords(1, 3, 4, 5, torch.device("cpu"), fps=25.0)
    inputs["video_coords"] = torch.cat([coordinates, coordinates[:, :, :6]], 2)
    dense = output(model, inputs)
    with apply(model, EVERYTHING["video_sparse"]) as applied:
        assert error(output(model, inputs), dense) < 1e-4
        assert applied.last_tokens == VideoTokens((3, 4, 5), 6)


@pytest.mark.parametrize("name", MODELS)
def test_dense_of_ours_knows_the_valid_text(models: dict[str, Any], name: str) -> None:
    """Dense layers with kernels of ours, for a precision or a backend that was asked for."""
    tiny, model = made(models, name)
    inputs = tiny.inputs(2)
    dense = output(model, inputs)
    with apply(model, Dense(), backend="cpu") as applied:
        assert error(output(model, inputs), dense) < 1e-4
        assert applied.backend_name() == "none: no layer is sparse"
        assert applied.backend_name(sparse=False) == "cpu"
