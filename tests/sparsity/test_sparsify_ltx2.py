"""sparsify on LTX-2: of six attention modules in a block, the video's own, and no other."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from sparsity_cases import config, error, vsa
from sparsity_model_cases import TILE, calls, model_output
from tiny_models import MODELS, Tiny, output, random
from torch import nn

import video_attn.sparsity as mtsa

DOCUMENT = {  # of the document, for LTX-2
    "sparse_cfg": {
        "*.attn1": {"method": "vsa", "top_k_ratio": 0.5, "block_size_3d": [4, 4, 4]},
        "*.attn2": {"enable": False},
        "*.audio_attn*": {"enable": False},
        "*.audio_to_video*": {"enable": False},
        "*.video_to_audio*": {"enable": False},
    },
}


@pytest.mark.parametrize(
    "configuration", [DOCUMENT, mtsa.VSA_DEFAULT, {"sparse_cfg": {"*": vsa()}}]
)
def test_has_two_sparse_calls_never_twelve(model_of: Any, configuration: Any) -> None:
    tiny, model = model_of("ltx2")
    mtsa.sparsify(model, configuration)
    assert len(mtsa.get_named_sparse_attention_modules(model)) == 12
    output(model, tiny.inputs(1))
    assert calls(model) == {f"transformer_blocks.{i}.attn1": 1 for i in range(2)}


def test_the_documents_targets(model_of: Any) -> None:
    _, model = model_of("ltx2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every pattern of the document matches
        mtsa.sparsify(model, DOCUMENT)
    enabled = [n for n, m in mtsa.get_named_sparse_attention_modules(model) if m.is_enabled]
    assert enabled == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


def test_text_as_long_as_the_video(model_of: Any) -> None:
    """At 256 x 256 x 121 both have 1024 tokens: only one of them is self-attention."""
    tiny, model = model_of("ltx2")
    inputs = tiny.inputs(1)
    inputs |= {
        "encoder_hidden_states": random(1, 60, 16),
        "encoder_attention_mask": torch.ones(1, 60).long(),
    }
    dense = output(model, inputs)
    mtsa.sparsify(model, {"sparse_cfg": {"*": vsa(1.0, block_size_3d=TILE)}})
    assert error(output(model, inputs), dense) < 1e-4
    assert calls(model) == {f"transformer_blocks.{i}.attn1": 1 for i in range(2)}


def test_condition_tokens_are_seen_by_all(model_of: Any) -> None:
    """Keyframes and references are appended after the video, with coordinates of their own."""
    tiny, model = model_of("ltx2")
    inputs = conditioned(tiny, model, 6)
    mtsa.sparsify(model, config("*attn1", ratio=0.25, block_size_3d=TILE))
    out = output(model, inputs)
    assert sum(calls(model).values()) == 2
    mtsa.unsparsify(model)
    assert error(out, model_output(tiny, model, inputs, 3, 0)) < 1e-4


def conditioned(tiny: Tiny, model: Any, extra: int) -> dict[str, Any]:
    inputs = tiny.inputs(1)
    coordinates = model.rope.prepare_video_coords(1, 3, 4, 5, torch.device("cpu"), fps=25.0)
    return inputs | {
        "hidden_states": torch.cat([inputs["hidden_states"], random(1, extra, 4)], 1),
        "video_coords": torch.cat([coordinates, coordinates[:, :, :extra]], 2),
    }


def test_masks_of_ic_lora(model_of: Any) -> None:
    tiny, model = model_of("ltx2")
    mask = torch.rand(1, 60, 60, generator=torch.Generator().manual_seed(0))
    inputs = tiny.inputs(1) | {"video_self_attention_mask": mask}
    dense = output(model, inputs)
    mtsa.sparsify(model, config("*.attn1", block_size_3d=TILE))
    with pytest.raises(ValueError, match=r"'transformer_blocks.0.attn1'.*cannot serve"):
        output(model, inputs)
    mtsa.set_sparse_attention_attribute(model, "*.attn1", {"on_unsupported": "dense"})
    with pytest.warns(UserWarning, match="runs dense"):
        assert torch.equal(output(model, inputs), dense)
    assert not calls(model)


def test_stg_passes() -> None:
    """Spatio-temporal guidance leaves attention out in some blocks: no call, and no warning."""
    tiny = MODELS["ltx2"]
    perturbed = Tiny(tiny.kind, tiny.config | {"perturbed_attn": True}, tiny.inputs, 2)
    model = perturbed.model()
    inputs = tiny.inputs(1) | {"spatio_temporal_guidance_blocks": [1]}
    inputs["perturbation_mask"] = torch.zeros(1)
    dense = output(model, inputs)
    mtsa.sparsify(model, config("*.attn1", ratio=1.0, block_size_3d=TILE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(output(model, inputs), dense) < 1e-4
    assert calls(model) == {"transformer_blocks.0.attn1": 1}
    output(model, tiny.inputs(1))
    assert calls(model) == {"transformer_blocks.0.attn1": 2, "transformer_blocks.1.attn1": 1}


def test_ltx23_keeps_another_weight_under_the_name_of_the_gate() -> None:
    """One number per head: the width tells it from a gate."""
    model = MODELS["ltx2"].model()
    attention = model.transformer_blocks[0].attn1
    attention.to_gate_compress = nn.Linear(16, 2)
    mtsa.sparsify(model, config("*.attn1", ratio=0.25, block_size_3d=TILE))
    assert attention._sparse_attention.gate_owner is None
    with_it = output(model, MODELS["ltx2"].inputs(1))
    mtsa.unsparsify(model)
    assert attention.to_gate_compress.out_features == 2
    del attention.to_gate_compress
    mtsa.sparsify(model, config("*.attn1", ratio=0.25, block_size_3d=TILE))
    assert torch.equal(output(model, MODELS["ltx2"].inputs(1)), with_it)
