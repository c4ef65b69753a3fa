"""sparsify on the video transformers of diffusers: numbers by the definition, calls, gates."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from sparsity_cases import config, error
from sparsity_model_cases import TILE, attention_layers, calls, model_output
from tiny_models import GRID, MODELS, TEXT, Tiny, output, random
from torch import Tensor, nn

import video_attn.sparsity as mtsa
from video_attn.integrations import apply, models
from video_attn.integrations.context import call_state

# A tiny model of each family.
FAMILIES = [
    next(name for name, tiny in MODELS.items() if tiny.kind in family.transformers)
    for family in models.FAMILIES
]


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_are_those_of_the_definition(model_of: Any, name: str) -> None:
    """Two prompts, ragged tiles; ratio 1 is the model itself."""
    tiny, model = model_of(name)
    inputs = tiny.inputs(2)
    dense = output(model, inputs)
    mtsa.sparsify(model, config("*", ratio=1.0, block_size_3d=TILE))
    assert error(output(model, inputs), dense) < 1e-4
    outs = {}
    for ratio, top_k in ((0.5, 6), (0.25, 3)):
        mtsa.set_sparse_attention_attribute(model, "*", {"top_k_ratio": ratio})
        outs[top_k] = output(model, inputs)
    assert sum(calls(model).values()) >= 3 * tiny.layers
    mtsa.unsparsify(model)
    assert torch.equal(output(model, inputs), dense)
    for top_k, out in outs.items():
        assert error(out, model_output(tiny, model, inputs, top_k, 0)) < 1e-4
        assert error(out, dense) > 1e-2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mochi"])
def test_gates_of_models(model_of: Any, name: str) -> None:
    tiny, model = model_of(name)
    inputs = tiny.inputs(2)
    mtsa.sparsify(model, config("*", ratio=0.25, block_size_3d=TILE))
    without = output(model, inputs)
    added = mtsa.add_gates(model)
    assert len(added) == tiny.layers
    assert torch.equal(output(model, inputs), without)  # zero at first
    gates = {id(layer): layer.to_gate_compress for layer in attention_layers(model)}
    torch.manual_seed(5)
    with torch.no_grad():
        for gate in gates.values():
            nn.init.normal_(gate.weight, std=0.3)
            nn.init.normal_(gate.bias, mean=1.0)
    out = output(model, inputs)
    mtsa.disable_sparse_attention(model, "*")
    expected = defined_from_disabled(tiny, model, inputs, gates)
    assert error(out, expected) < 1e-4
    assert error(out, without) > 1e-2


def defined_from_disabled(tiny: Tiny, model: Any, inputs: Any, gates: Any) -> Tensor:
    """The definition on a model whose gates unsparsify would take away."""
    mtsa.sparsify(model, {"sparse_cfg": {}})
    kept = {layer: layer._modules.pop("to_gate_compress") for layer in attention_layers(model)}
    for layer in kept:
        layer._sparse_attention.added_gate = False
    mtsa.unsparsify(model)
    return model_output(tiny, model, inputs, 3, gates)


# -- geometry --------------------------------------------------------------------------------------


def test_the_shape_follows_each_call(model_of: Any) -> None:
    tiny, model = model_of("wan")
    mtsa.sparsify(model, config(ratio=1.0, block_size_3d=TILE))
    for size in ((3, 8, 10), (2, 6, 4)):
        inputs = tiny.inputs(1) | {"hidden_states": random(1, 4, *size)}
        sparse = output(model, inputs)
        assert model.blocks[0].attn1._sparse_attention.last_grid == (
            size[0],
            size[1] // 2,
            size[2] // 2,
        )
        mtsa.disable_sparse_attention(model, "*")
        assert error(sparse, output(model, inputs)) < 1e-4
        mtsa.enable_sparse_attention(model, "*attn1")


def test_a_said_shape_that_the_call_contradicts(model_of: Any) -> None:
    tiny, model = model_of("wan")
    mtsa.sparsify(model, config(video_shape=(3, 5, 4), block_size_3d=TILE))
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*does not match video shape \(3, 5, 4\)"):
        output(model, tiny.inputs(1))
    mtsa.set_sparse_attention_attribute(model, "*", {"video_shape": GRID})
    output(model, tiny.inputs(1))


def test_a_call_that_fails_leaves_nothing_behind(model_of: Any) -> None:
    tiny, model = model_of("wan")
    mtsa.sparsify(model, config(block_size_3d=TILE))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        output(model, tiny.inputs(1))
    handle.remove()
    assert call_state(model) is None
    with pytest.raises(
        ValueError, match="video_shape must be set"
    ):  # a layer alone, outside of any call
        model.blocks[0].attn1(random(1, 60, 24))


def test_both_transformers_of_a_pipeline() -> None:
    class Pipeline:
        transformer = MODELS["wan"].model()
        transformer_2 = MODELS["wan"].model(1)

    pipe = mtsa.sparsify(Pipeline(), config("*attn1*", block_size_3d=TILE))
    names = [name for name, _ in mtsa.get_named_sparse_attention_modules(pipe)]
    assert names[0] == "transformer.blocks.0.attn1" and names[-1] == "transformer_2.blocks.1.attn2"
    for part in (pipe.transformer, pipe.transformer_2):
        output(part, MODELS["wan"].inputs(1))
        assert calls(part) == {"blocks.0.attn1": 1, "blocks.1.attn1": 1}
    mtsa.unsparsify(pipe)
    assert not mtsa.is_attn_sparsified(pipe)


def test_a_model_inside_a_model(model_of: Any) -> None:
    """The transformer is found wherever it is, and keeps its own video shape."""
    tiny, transformer = model_of("wan")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformer

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    wrapper = mtsa.sparsify(Wrapper(), config(block_size_3d=TILE))
    output(wrapper, tiny.inputs(1))
    assert calls(wrapper) == {"inner.blocks.0.attn1": 1, "inner.blocks.1.attn1": 1}


def test_two_threads_with_two_sizes(model_of: Any) -> None:
    tiny, model = model_of("wan")
    mtsa.sparsify(model, config(ratio=0.25, block_size_3d=TILE))
    inputs = [
        tiny.inputs(1) | {"hidden_states": random(1, 4, 3, h, w)} for h, w in ((8, 10), (10, 8))
    ]
    expected = [output(model, each) for each in inputs]
    start, failures = threading.Barrier(2), []

    def work(index: int) -> None:
        start.wait()
        for _ in range(10):
            if not torch.equal(output(model, inputs[index]), expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and calls(model) == {"blocks.0.attn1": 22, "blocks.1.attn1": 22}


# -- schedule --------------------------------------------------------------------------------------


def test_dense_layers(model_of: Any) -> None:
    tiny, model = model_of("wan")
    mtsa.sparsify(model, config(schedule={"dense_layers": 1}, block_size_3d=TILE))
    output(model, tiny.inputs(1))
    assert calls(model) == {"blocks.1.attn1": 1}
    assert model.blocks[0].attn1._sparse_attention.dense_calls == {"dense layer": 1}


def test_dense_steps(model_of: Any) -> None:
    tiny, transformer = model_of("wan")

    class Pipeline:
        def __init__(self) -> None:
            self.transformer = transformer
            self.scheduler = type("Scheduler", (), {"timesteps": torch.tensor([900.0, 500, 100])})()

        def run(self) -> None:
            for timestep in self.scheduler.timesteps:
                output(self.transformer, tiny.inputs(1) | {"timestep": timestep[None]})

    pipe = Pipeline()
    schedule = {"dense_first_steps": 1, "dense_last_steps": 1}
    mtsa.sparsify(pipe, config(schedule=schedule, block_size_3d=TILE))
    pipe.run()
    assert calls(transformer) == {"blocks.0.attn1": 1, "blocks.1.attn1": 1}
    assert transformer.blocks[0].attn1._sparse_attention.dense_calls == {"dense step": 2}
    mtsa.unsparsify(pipe)
    del pipe  # it would be found on the call stack
    mtsa.sparsify(transformer, config(schedule=schedule, block_size_3d=TILE))
    with pytest.raises(ValueError, match="timesteps"):
        output(transformer, tiny.inputs(1))
    with mtsa.video_shape(transformer, GRID, step=(1, 3)):
        output(transformer, tiny.inputs(1))
    assert sum(calls(transformer).values()) == 2


# -- others ----------------------------------------------------------------------------------------


def test_a_processor_set_later_is_sparse_too(model_of: Any) -> None:
    tiny, model = model_of("wan")
    mtsa.sparsify(model, config(ratio=0.25, block_size_3d=TILE))
    expected = output(model, tiny.inputs(1))
    attention = model.blocks[0].attn1
    attention.set_processor(type(attention.processor.before)())
    assert torch.equal(output(model, tiny.inputs(1)), expected)


def test_copies_of_transformers_stand_alone() -> None:
    """With their hooks, gates and processors, through copy and pickle; each is undone by itself."""
    tiny, model = MODELS["wan"], MODELS["wan"].model()
    mtsa.sparsify(model, config(ratio=0.25, block_size_3d=TILE))
    mtsa.add_gates(model)
    nn.init.normal_(model.blocks[0].attn1.to_gate_compress.weight)
    expected = output(model, tiny.inputs(1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, tiny.inputs(1)), expected)
        mtsa.unsparsify(other)
        assert not other._forward_hooks and not other._forward_pre_hooks
    assert calls(model) == {"blocks.0.attn1": 1, "blocks.1.attn1": 1}
    assert torch.equal(output(model, tiny.inputs(1)), expected)


def test_fused_projections_of_diffusers(model_of: Any) -> None:
    tiny, model = model_of("cogvideox")
    mtsa.sparsify(model, config("*", ratio=0.25, block_size_3d=TILE))
    expected = output(model, tiny.inputs(2))
    model.fuse_qkv_projections()
    assert error(output(model, tiny.inputs(2)), expected) < 1e-5
    assert sum(calls(model).values()) == 2 * tiny.layers
    model.unfuse_qkv_projections()


@torch.no_grad()
def test_a_video_model_of_transformers() -> None:
    """Its attention calls torch's through functions of another module."""
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    model: Any = VideoMAEModel(
        VideoMAEConfig(
            image_size=32, patch_size=8, num_frames=8, tubelet_size=2, hidden_size=32,
            num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        )
    ).eval()  # fmt: skip
    for layer in model.encoder.layer:
        layer.attention.attention.query.weight.mul_(60)
    clip = random(1, 8, 3, 32, 32)
    dense = model(clip).last_hidden_state
    mtsa.sparsify(model, config("*attention*", ratio=1.0, block_size_3d=TILE))
    with mtsa.video_shape(model, (4, 4, 4)):
        assert error(model(clip).last_hidden_state, dense) < 1e-4
        mtsa.set_sparse_attention_attribute(model, "*", {"top_k_ratio": 0.25})
        assert error(model(clip).last_hidden_state, dense) > 1e-3
    assert list(calls(model).values()) == [2, 2]


def test_attention_backends_of_diffusers(model_of: Any) -> None:
    """Whatever backend is set, before or after, the sparse layers are ours."""
    tiny, model = model_of("wan")
    mtsa.sparsify(model, config(ratio=0.25, block_size_3d=TILE))
    expected = output(model, tiny.inputs(1))
    for block in model.blocks:
        block.attn1.processor._attention_backend = "flash"  # not installed here
    assert torch.equal(output(model, tiny.inputs(1)), expected)


def test_not_both_sparsify_and_apply(model_of: Any) -> None:
    from video_attn import VideoSparse

    _, model = model_of("wan")
    with (
        apply(model, VideoSparse(top_k_ratio=0.5)),
        pytest.raises(RuntimeError, match="replaced already, by apply"),
    ):
        mtsa.sparsify(model, config())
    assert not mtsa.is_attn_sparsified(model)


def test_fp16_and_text_lengths_stay_tensors(model_of: Any) -> None:
    """Half precision, and padded text of HunyuanVideo whose mask is the family's business."""
    tiny, model = MODELS["hunyuan"], MODELS["hunyuan"].model().to(torch.bfloat16)
    inputs = {
        name: x.to(torch.bfloat16) if x.is_floating_point() and name != "timestep" else x
        for name, x in tiny.inputs(2).items()
    }
    dense = output(model, inputs)
    mtsa.sparsify(model, config("*", ratio=1.0, block_size_3d=TILE))
    out = output(model, inputs)
    assert out.dtype == torch.bfloat16 and error(out.float(), dense.float()) < 0.1
    assert inputs["encoder_hidden_states"].shape[1] == TEXT
