"""Packages that wrap the blocks and projections of a transformer, where they are installed:
``pip install peft cache-dit`` (tried with 0.18.0 and 1.5.3).
"""

from __future__ import annotations

import pytest
from tiny_models import MODELS, output
from tiny_wan import CALLS, LAYERS, STEPS, latents, tiny_wan
from torch import Tensor

from video_attn import SlidingTile
from video_attn.integrations import apply

EVERYTHING = SlidingTile((9, 9, 9), (2, 2, 2))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.std())


def test_adapters_of_peft_come_and_go() -> None:
    peft = pytest.importorskip("peft")
    tiny = MODELS["wan"]
    model, inputs = tiny.model(), tiny.inputs(1)
    plain = output(model, inputs)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(config)
    adapted = output(model, inputs)
    assert error(adapted, plain) > 1e-3
    with apply(model, EVERYTHING) as handle:
        assert error(output(model, inputs), adapted) < 1e-4
        model.disable_adapters()
        assert error(output(model, inputs), plain) < 1e-4
        model.enable_adapters()
        model.delete_adapters("default")
        assert error(output(model, inputs), plain) < 1e-4
        model.add_adapter(config, "another")
        assert error(output(model, inputs), plain) > 1e-3
        assert handle.sparse_calls == 4 * tiny.layers
    with pytest.raises(ValueError, match=r"fuse_qkv must be False: .* carries a LoRA"):
        apply(model, EVERYTHING, fuse_qkv=True)


@pytest.mark.parametrize("first", ["cache", "attention"])
def test_blocks_that_cache_dit_skips_count_nothing(first: str) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    pipe = tiny_wan()
    dense = latents(pipe)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=100.0
    )
    handle = apply(pipe, EVERYTHING) if first == "attention" else None
    cache_dit.enable_cache(pipe, cache_config=config)
    handle = apply(pipe, EVERYTHING) if handle is None else handle
    applied = latents(pipe)
    assert LAYERS < handle.sparse_calls < STEPS * LAYERS * CALLS
    handle.undo()
    cached = latents(pipe)
    assert error(applied, cached) < 1e-4 and error(cached, dense) > 1e-3
    cache_dit.disable_cache(pipe)
    assert error(latents(pipe), dense) == 0
