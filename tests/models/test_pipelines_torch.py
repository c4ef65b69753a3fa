"""As test_pipelines.py: compiled models, gradient checkpointing and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import MODELS, output, random
from tiny_wan import (
    CALLS,
    FIRST,
    LAYERS,
    PATTERN,
    STEPS,
    counts,
    error,
    latents,
)
from torch import Tensor

from video_attn import SlidingTile
from video_attn.integrations import Schedule, applied_to, apply, fused_norms
from video_attn.integrations.intercept import call_with_attention

dispatch = pytest.importorskip("diffusers.models.attention_dispatch")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name, backend", [("wan", "aot_eager"), ("hunyuan", "eager")])
def test_compile_of_repeated_blocks(name: str, backend: str, fresh_compiler: None) -> None:
    """No graph break, and one graph for dense and sparse layers of each kind of block."""
    tiny, model = MODELS[name], MODELS[name].model()
    inputs = tiny.inputs(2)
    pattern = SlidingTile((1, 1, 2), (2, 2, 2))
    with apply(model, pattern, schedule=Schedule(dense_layers=1)) as handle:
        eager = output(model, inputs)
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        assert error(output(model, inputs), eager) < 1e-4
        assert counts(handle) == (2, 2)
        assert graphs() == len(model._repeated_blocks)


def test_compile_of_the_transformer_before_and_after(pipe: Any, fresh_compiler: None) -> None:
    """One graph for all steps; a pipeline compiled before, and one with another schedule."""
    with apply(pipe, PATTERN, schedule=FIRST):
        eager = latents(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    with apply(pipe, PATTERN, schedule=FIRST) as handle:
        assert applied_to(pipe) is handle
        assert error(latents(pipe), eager) < 1e-4
        assert counts(handle) == ((STEPS - 1) * CALLS, CALLS)
        assert graphs() == 1


def test_compiled_code_serves_many_sizes(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three graphs, as without a pattern, for all layers, sizes and steps; norms fused as on a GPU,
    by their definition in torch.
    """
    monkeypatch.setattr(fused_norms, "_serves", lambda device, dtype: True)
    monkeypatch.setattr(fused_norms, "_fits", lambda *_: False)
    monkeypatch.setattr(fused_norms, "from_tiles", lambda x, video: video.from_tiles(x, 1))
    tiny, model = MODELS["wan"], MODELS["wan"].model()
    sizes = (3, 8, 10), (4, 8, 12), (5, 6, 6), (2, 12, 8)
    calls = [tiny.inputs(1) | {"hidden_states": random(1, 4, *size)} for size in sizes]
    with apply(model, PATTERN, schedule=Schedule(dense_layers=1)):
        expected = [output(model, inputs) for inputs in calls]
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        for inputs, right in zip(calls, expected, strict=True):
            assert error(output(model, inputs), right) < 1e-4
        assert graphs() <= 3


@pytest.mark.parametrize("how", ["wrapped", "in_place", "blocks"])
def test_compiled_and_run_before_apply(how: str, fresh_compiler: None) -> None:
    """Code that was compiled dense is not used for sparse calls, and comes back after undo()."""
    tiny, model = MODELS["wan"], MODELS["wan"].with_config(num_layers=1)
    inputs, called = tiny.inputs(1), model
    with apply(model, PATTERN):
        expected = output(model, inputs)
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
    if how == "wrapped":
        called = torch.compile(model, **options)
    elif how == "in_place":
        model.compile(**options)
    else:
        model.compile_repeated_blocks(**options)
    dense = output(called, inputs)
    for _ in range(2):
        with apply(model, PATTERN) as handle:
            assert error(output(called, inputs), expected) < 1e-4
            assert counts(handle) == (1, 0)
        assert torch.equal(output(called, inputs), dense)
    assert error(expected, dense) > 1e-3


def test_compiled_training_breaks_its_graph_and_has_gradients(fresh_compiler: None) -> None:
    tiny, model = MODELS["wan"], MODELS["wan"].with_config(num_layers=1)
    inputs = tiny.inputs(1)

    def gradient() -> Tensor:
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return model.blocks[0].attn1.to_q.weight.grad.clone()

    with apply(model, PATTERN):
        expected = gradient()
        model.compile_repeated_blocks(backend="eager")
        assert error(gradient(), expected) < 1e-3
    assert graphs() > 1


def test_gradient_checkpointing_sees_the_mask_of_its_own_call() -> None:
    """Two forwards before one backward: the sizes and patterns of the first are still there."""
    tiny, model = MODELS["wan"], MODELS["wan"].model()
    inputs = tiny.inputs(1)
    other = inputs | {"hidden_states": random(1, 4, 4, 6, 8), "timestep": torch.tensor([900.0])}

    def gradients() -> list[Tensor]:
        model.zero_grad()
        outputs = [model(**x, return_dict=False)[0].square().mean() for x in (inputs, other)]
        sum(outputs).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with apply(model, PATTERN, schedule=FIRST, timesteps=[900, 500]) as handle:
        expected = gradients()
        counted = counts(handle)
        assert counted == (LAYERS, LAYERS)
        model.enable_gradient_checkpointing()
        for got, want in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert counts(handle) == (2 * LAYERS, 2 * LAYERS)
    assert type(model._gradient_checkpointing_func).__name__ == "function"


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_autocast(name: str) -> None:
    """Norms give fp32 and projections bf16; torch's attention casts, and so does this."""
    tiny, model = MODELS[name], MODELS[name].model()
    inputs = tiny.inputs(1)
    with torch.autocast("cpu", torch.bfloat16):
        dense = output(model, inputs)
        with apply(model, SlidingTile((9, 9, 9), (2, 2, 2))) as handle:
            got = output(model, inputs)
        assert handle.sparse_calls == tiny.layers
    assert got.dtype == dense.dtype
    assert error(got.float(), dense.float()) < 0.05


def test_autocast_makes_one_dtype_of_three() -> None:
    """As on a GPU, where norms leave fp32 under autocast."""
    query, key, value = (torch.randn(1, 2, 8, 16) for _ in range(3))
    seen: list[Any] = []

    def attend(call: Any) -> Tensor:
        seen.append({x.dtype for x in (call.query, call.key, call.value)})
        return call.dense()

    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16):
        out = call_with_attention(attend, attention, query, key, value.bfloat16())
    assert seen == [{torch.bfloat16}] and out.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        call_with_attention(attend, attention, query, key, value.bfloat16())
