"""The pipelines of the other families: their loops, schedulers and guidance, attention applied.

Wan's are in test_pipelines.py, CogVideoX's in test_cogvideox.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, output
from tiny_pipelines import PIPELINES, latents
from torch import Tensor

from video_attn import SlidingTile
from video_attn.integrations import Schedule, apply

STEPS, TILE = 4, (2, 2, 2)


BF16 = ["ltx", "mochi", "hunyuan", "hunyuan15", "skyreels"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in PIPELINES] + [(name, torch.bfloat16) for name in BF16],
)
def test_steps_and_sparsity_of_a_pipeline(name: str, dtype: torch.dtype) -> None:
    """In bf16 the timesteps that the transformer is given are rounded; the steps are right."""
    make, calls = PIPELINES[name]
    pipe, options = make()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(dtype)
    options = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
               for k, v in options.items()}  # fmt: skip
    dense = latents(pipe, options, STEPS)
    schedule = Schedule(dense_first_steps=1, dense_last_steps=1)
    layers = MODELS[name].layers * calls
    with apply(pipe, SlidingTile((1, 1, 2), TILE), schedule=schedule) as handle:
        sparse = latents(pipe, options, STEPS)
        assert (handle.sparse_calls, handle.dense_calls) == ((STEPS - 2) * layers, 2 * layers)
    with apply(pipe, SlidingTile((9, 9, 9), TILE), schedule=schedule):
        everything = latents(pipe, options, STEPS)
    bound = 1e-4 if dtype == torch.float32 else 0.1
    assert float((everything - dense).abs().max() / dense.std()) < bound
    if dtype == torch.float32:
        assert float((sparse - dense).abs().max() / dense.std()) > 1e-3
    assert torch.equal(latents(pipe, options, STEPS), dense)


def same(got: Tensor, expected: Tensor) -> bool:
    """To rounding: products may differ with the alignment of weights in a file."""
    return float((got - expected).abs().max() / expected.std()) < 1e-4


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_from_disk(name: str, tmp_path: Path) -> None:
    """Saved with attention applied: what is loaded is the plain pipeline, and takes it again."""
    pipe, options = PIPELINES[name][0]()
    pattern = SlidingTile((1, 1, 2), TILE)
    dense = latents(pipe, options, 2)
    with apply(pipe, pattern):
        sparse = latents(pipe, options, 2)
        pipe.save_pretrained(tmp_path)
    absent = {part: None for part, value in pipe.components.items() if value is None}
    loaded = type(pipe).from_pretrained(tmp_path, local_files_only=True, **absent)
    assert same(latents(loaded, options, 2), dense)
    with apply(loaded, pattern):
        assert same(latents(loaded, options, 2), sparse)
    assert not same(sparse, dense)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - PIPELINES.keys()))
def test_a_transformer_from_disk(name: str, tmp_path: Path) -> None:
    """The classes whose pipelines are tested elsewhere: the same output, sparse and dense."""
    tiny = MODELS[name]
    model, inputs, pattern = tiny.model(), tiny.inputs(1), SlidingTile((1, 1, 2), TILE)
    dense = output(model, inputs)
    with apply(model, pattern):
        sparse = output(model, inputs)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, local_files_only=True).eval()
    assert same(output(loaded, inputs), dense)
    with apply(loaded, pattern):
        assert same(output(loaded, inputs), sparse)
