"""What outlives a process: exported and restored configurations, saved gates, FastWan's gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsity_cases import GRID, VideoModel, config, made, video, vsa
from tiny_models import MODELS, output
from torch import nn

import video_attn.sparsity as mtsa
from video_attn.integrations import Schedule

MIXED = {
    "sparse_cfg": {
        lambda name: name.endswith("attn1"): vsa(
            0.25, video_shape=GRID, schedule=Schedule(dense_layers=1), collect_stats=True
        ),
        "blocks.0.attn2": {"method": "sta", "window": (1, 2, 3), "enable": False},
        "default": {"enable": False},
    }
}


def described(model: Any) -> dict[str, Any]:
    return {
        name: (type(module).__name__, module.is_enabled, module.get_threshold_info(),
               module._sparse_attention.attributes)
        for name, module in mtsa.get_named_sparse_attention_modules(model)
    }  # fmt: skip


def test_export_and_restore() -> None:
    """Through JSON, into a fresh model: the same map of names, and the same outputs."""
    model, x, text = mtsa.sparsify(made(VideoModel), MIXED), video(), video(2, 5)
    mtsa.disable_sparse_attention(model, "blocks.1.attn1")
    model.blocks[0].attn1.set_video_shape(GRID[::-1])
    mtsa.set_sparse_attention_attribute(model, "blocks.0.attn1", {"schedule": {}})
    exported = json.loads(json.dumps(mtsa.export_sparse_attention_config(model)))
    other = mtsa.restore_sparse_attention_model(made(VideoModel, seed=1), exported)
    assert described(other) == described(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, text), model(x, text))
    assert exported["producer"]["name"] == "video-attn"
    assert mtsa.export_sparse_attention_config(made(VideoModel)) is None


@pytest.mark.parametrize("change, error, words", [
    (lambda e: e.pop("modules"), TypeError, "must be what export_sparse_attention_config gave"),
    (lambda e: e.update(format=2), ValueError, "format must be 1, got 2"),
    (lambda e: e["modules"].update({"blocks.9.attn1": e["modules"]["blocks.0.attn1"]}), ValueError,
     "no attention module 'blocks.9.attn1'"),
    (lambda e: e["modules"]["blocks.0.attn1"]["attributes"].update(top_k_ratio=7), ValueError,
     "top_k_ratio must be in"),
    (lambda e: e["modules"]["blocks.0.attn1"].update(video_shape=[1, 2]), ValueError, "3 elements"),
])  # fmt: skip
def test_a_damaged_export_changes_nothing(change: Any, error: Any, words: str) -> None:
    exported = mtsa.export_sparse_attention_config(mtsa.sparsify(made(VideoModel), MIXED))
    assert exported is not None
    change(exported)
    fresh = made(VideoModel)
    with pytest.raises(error, match=words):
        mtsa.restore_sparse_attention_model(fresh, exported)
    assert not mtsa.is_attn_sparsified(fresh)


def test_save_and_load(tmp_path: Path) -> None:
    model, x, text = mtsa.sparsify(made(VideoModel), config(video_shape=GRID)), video(), video(2, 5)
    assert mtsa.add_gates(model) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert mtsa.add_gates(model) == []
    torch.manual_seed(3)
    for block in model.blocks:
        nn.init.normal_(block.attn1.to_gate_compress.weight)
    mtsa.save(model, tmp_path / "run")
    files = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert files == ["sparse_attention.json", "sparse_attention_gates.safetensors"]
    assert len(load_file(tmp_path / "run" / files[1])) == 4
    other = mtsa.load(made(VideoModel), tmp_path / "run")
    assert torch.equal(other(x, text), model(x, text))
    assert described(other) == described(model)
    mtsa.unsparsify(other)
    assert not hasattr(other.blocks[0].attn1, "to_gate_compress")

    (tmp_path / "run" / files[1]).unlink()
    with pytest.warns(UserWarning, match="the model had gates, but"):
        mtsa.load(made(VideoModel), tmp_path / "run")
    (tmp_path / "run" / files[0]).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        mtsa.load(made(VideoModel), tmp_path / "run")
    with pytest.raises(OSError):
        mtsa.load(made(VideoModel), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not sparsified"):
        mtsa.save(made(VideoModel), tmp_path)


def test_added_gates_are_the_only_new_parameters() -> None:
    model = made(VideoModel)
    before = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    mtsa.sparsify(model, config(video_shape=GRID))
    assert mtsa.add_gates(model, "blocks.1.*") == ["blocks.1.attn1"]
    after = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert {name: after[name] for name in before} == before
    assert {name: after[name] for name in after if name not in before} == {
        "blocks.1.attn1.to_gate_compress.weight": (32, 32),
        "blocks.1.attn1.to_gate_compress.bias": (32,),
    }
    assert not any(model.blocks[1].attn1.to_gate_compress.weight.flatten())
    with pytest.raises(ValueError, match="not sparsified"):
        mtsa.add_gates(made(VideoModel))


# -- FastWan ---------------------------------------------------------------------------------------


def fastwan_checkpoint(prefix: str = "", place: str = "") -> dict[str, torch.Tensor]:
    """The keys of a FastWan checkpoint in the form of diffusers: a gate on each block."""
    model = MODELS["wan"].model(3)
    generator = torch.Generator().manual_seed(7)
    weights = {prefix + name: x.clone() for name, x in model.state_dict().items()}
    for i in range(2):
        gate = f"{prefix}blocks.{i}.{place}to_gate_compress."
        weights[gate + "weight"] = torch.randn(24, 24, generator=generator)
        weights[gate + "bias"] = torch.randn(24, generator=generator)
    return weights


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("place", ["", "attn1."])
def test_fastwan_checkpoints_keep_their_gates(prefix: str, place: str) -> None:
    checkpoint = fastwan_checkpoint(prefix, place)
    model = MODELS["wan"].model()
    bare = {name.removeprefix(prefix): x for name, x in checkpoint.items()}
    missing = model.load_state_dict(bare, strict=False)
    assert len(missing.unexpected_keys) == 4 and not missing.missing_keys  # dropped by diffusers
    mtsa.sparsify(model, config(ratio=0.5, block_size_3d=(2, 2, 2)))
    without = output(model, MODELS["wan"].inputs(1))
    assert mtsa.load_gates(model, checkpoint) == ["blocks.0.attn1", "blocks.1.attn1"]
    for i in range(2):
        gate = model.blocks[i].attn1.to_gate_compress
        assert torch.equal(gate.weight, bare[f"blocks.{i}.{place}to_gate_compress.weight"])
        assert torch.equal(gate.bias, bare[f"blocks.{i}.{place}to_gate_compress.bias"])
        # FastVideo's kernels choose tiles by scores in bfloat16.
        assert model.blocks[i].attn1._sparse_attention.attributes.score_dtype == "bfloat16"
    assert not torch.equal(output(model, MODELS["wan"].inputs(1)), without)


def test_a_gate_on_the_block_is_that_of_its_self_attention() -> None:
    """As FastVideo has it in memory; the text cross-attention beside it has none."""
    model, checkpoint = MODELS["wan"].model(), fastwan_checkpoint()
    for i, block in enumerate(model.blocks):
        block.to_gate_compress = nn.Linear(24, 24)
        block.to_gate_compress.weight.data = checkpoint[f"blocks.{i}.to_gate_compress.weight"]
        block.to_gate_compress.bias.data = checkpoint[f"blocks.{i}.to_gate_compress.bias"]
    mtsa.sparsify(model, config("*", ratio=0.5, block_size_3d=(2, 2, 2)))
    assert model.blocks[0].attn1._sparse_attention.gate_owner is model.blocks[0]
    assert model.blocks[0].attn2._sparse_attention.gate_owner is None
    other = MODELS["wan"].model()
    mtsa.sparsify(other, config("*", ratio=0.5, block_size_3d=(2, 2, 2)))
    mtsa.load_gates(other, checkpoint, score_dtype=None)
    inputs = MODELS["wan"].inputs(2)
    assert torch.equal(output(model, inputs), output(other, inputs))
    mtsa.unsparsify(model)
    assert isinstance(model.blocks[0].to_gate_compress, nn.Linear)  # the model's own stays


def test_gates_from_files(tmp_path: Path) -> None:
    checkpoint = fastwan_checkpoint()
    first = {name: x for name, x in checkpoint.items() if "blocks.0" in name}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(
        {name: x for name, x in checkpoint.items() if name not in first},
        tmp_path / "model-2.safetensors",
    )
    model = mtsa.sparsify(MODELS["wan"].model(), config())
    assert len(mtsa.load_gates(model, tmp_path)) == 2
    model = mtsa.sparsify(MODELS["wan"].model(), config())
    assert mtsa.load_gates(model, tmp_path / "model-1.safetensors") == ["blocks.0.attn1"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no safetensors file"):
        mtsa.load_gates(model, tmp_path / "empty")


@pytest.mark.parametrize("checkpoint, words", [
    ({}, "has no 'to_gate_compress'"),
    ({"blocks.5.to_gate_compress.weight": torch.zeros(24, 24)}, "a gate on 'blocks.5'"),
    ({"blocks.0.to_gate_compress.weight": torch.zeros(24, 12)},
     r"'weight': \(24, 24\).*got \{'weight': \(24, 12\)"),
    ({"blocks.0.to_gate_compress.bias": torch.zeros(24)},
     r"must be a linear layer.*got \{'bias': \(24,\)\}"),
    ({"blocks.0.to_gate_compress.weight": torch.zeros(24, 24),
      "blocks.0.to_gate_compress.bias": torch.zeros(12)}, r"'bias': \(12,\)"),
    ({"blocks.0.to_gate_compress.weight": torch.zeros(2, 24)}, "was not trained with gates"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit(checkpoint: Any, words: str) -> None:
    model = mtsa.sparsify(MODELS["wan"].model(), config())
    with pytest.raises(ValueError, match=words):
        mtsa.load_gates(model, checkpoint)
    assert not hasattr(model.blocks[0].attn1, "to_gate_compress")


def test_gates_have_the_dtype_of_the_projections() -> None:
    """Norms of diffusers may stay in fp32 beside a model in bfloat16."""
    model = MODELS["wan"].model().to(torch.bfloat16)
    for block in model.blocks:
        block.attn1.norm_q.float()
    mtsa.sparsify(model, config(block_size_3d=(2, 2, 2)))
    mtsa.add_gates(model)
    assert model.blocks[0].attn1.to_gate_compress.weight.dtype == torch.bfloat16
