"""torch.compile of sparsified models: no graph break that dense does not have, same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparsity_cases import GRID, WIDTH, VideoAttention, VideoModel, config, error, made, video
from tiny_models import MODELS, output, random
from torch import nn

import video_attn.sparsity as mtsa

TILE = (2, 2, 2)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["wan", "ltx2", "cogvideox"])
def test_a_whole_transformer_in_one_graph(name: str) -> None:
    tiny = replace(MODELS[name], config=MODELS[name].config | {"num_layers": 1}, layers=1)
    model = tiny.model()
    mtsa.sparsify(model, config("*", ratio=0.25, block_size_3d=TILE, collect_stats=True))
    mtsa.add_gates(model)
    expected = output(model, tiny.inputs(1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert error(output(compiled, tiny.inputs(1)), expected) < 1e-5
    layers = [m for _, m in mtsa.get_named_sparse_attention_modules(model)
              if m._sparse_attention.other_role is None]  # fmt: skip
    # What runs is counted, compiled or not.
    assert [layer._sparse_attention.sparse_calls for layer in layers] == [2] * tiny.layers
    assert [layer.get_stats()["total_calls"] for layer in layers] == [2] * tiny.layers


def test_switches_and_sizes_hold_in_compiled_blocks() -> None:
    tiny = MODELS["wan"]
    model = tiny.model()
    mtsa.sparsify(model, config(ratio=0.25, block_size_3d=TILE))
    inputs = [tiny.inputs(1), tiny.inputs(1) | {"hidden_states": random(1, 4, 3, 10, 8)}]
    expected = [output(model, each) for each in inputs]
    mtsa.disable_sparse_attention(model, "*")
    dense = output(model, inputs[0])
    mtsa.enable_sparse_attention(model, "*attn1")
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        for each, wanted in zip(inputs, expected, strict=True):
            assert error(output(model, each), wanted) < 1e-5
    mtsa.disable_sparse_attention(model, "*")
    assert error(output(model, inputs[0]), dense) < 1e-5


@torch.no_grad()
def test_plain_models_in_one_graph() -> None:
    """The self-attention is told from the cross-attention while tracing."""
    model, x, text = made(VideoModel), video(), video(2, seed=4)
    mtsa.sparsify(model, config("*", ratio=0.25))
    mtsa.add_gates(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for shape in (GRID, GRID[::-1]):
        with mtsa.video_shape(model, shape):
            assert error(compiled(x, text), model(x, text)) < 1e-5
    assert [block.attn1._sparse_attention.sparse_calls for block in model.blocks] == [4, 4]
    assert [block.attn2._sparse_attention.sparse_calls for block in model.blocks] == [0, 0]


@torch.no_grad()
def test_masks_in_compiled_code() -> None:
    """Key padding becomes lengths; another mask raises when it is met."""
    module = made(VideoAttention)
    length = GRID[0] * GRID[1] * GRID[2] + 6
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    mask[..., -2:] = False
    module.options = {"attn_mask": mask}
    mtsa.sparsify(module, config("*", ratio=0.25))
    x = video(2, length)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with mtsa.video_shape(module, GRID, text_length=6):
        assert error(compiled(x)[:, :-2], module(x)[:, :-2]) < 1e-5
        mask[..., 0] = False
        with pytest.raises(ValueError, match="hides tokens of the video"):
            compiled(x)


@torch.no_grad()
def test_multihead_attention_in_one_graph() -> None:
    module, x = made(lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True)), video()
    mtsa.sparsify(module, config("*", ratio=0.25, video_shape=GRID))
    expected = module(x, x, x, need_weights=False)[0]
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert error(compiled(x, x, x, need_weights=False)[0], expected) < 1e-5


def test_training_compiled_gives_the_same_gradients() -> None:
    model, x, text = made(VideoModel), video(), video(2, 5)
    del model.blocks[1]
    mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
    mtsa.add_gates(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)

    def gradients(function: Any) -> list[torch.Tensor]:
        model.zero_grad()
        function(x, text).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for got, wanted in zip(gradients(compiled), gradients(model), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_training_a_compiled_transformer() -> None:
    """What a call is about is read while tracing, and guarded: another size is another graph."""
    tiny = replace(MODELS["wan"], config=MODELS["wan"].config | {"num_layers": 1}, layers=1)
    model = tiny.model().train()
    mtsa.sparsify(model, config(ratio=0.25, block_size_3d=TILE))
    mtsa.add_gates(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    for size in ((8, 10), (10, 8)):
        inputs = tiny.inputs(1) | {"hidden_states": random(1, 4, 3, *size)}
        grads = []
        for function in (compiled, model):
            model.zero_grad()
            function(**inputs, return_dict=False)[0].square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for got, wanted in zip(*grads, strict=True):
            assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-6)
