"""As test_pipelines.py: weights, wrappers, caches and copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_wan import (
    CALLS,
    FIRST,
    PATTERN,
    STEPS,
    counts,
    error,
    latents,
    tiny_transformer,
    tiny_wan,
)
from torch import Tensor, nn

from video_attn import (
    SlidingTile,
)
from video_attn.integrations import applied_to, apply

pytest.importorskip("diffusers.models.attention_dispatch")


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
