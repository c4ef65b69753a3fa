"""Norms, rotary positions and tile order in one kernel: its definition, and models with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_ltx2 as ltx2
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny_models import MODELS, output
from torch import Tensor

from video_attn import Dense, Radial, SlidingTile
from video_attn.integrations import apply, fused_norms
from video_attn.integrations.fused_norms import Deferred, finish, from_tiles
from video_attn.layout import VideoLayout

TILE = (2, 2, 2)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel runs on the CPU, in Triton's interpreter; counts how often it is asked for."""
    calls: list[int] = []
    whole = fused_norms.finish

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return whole(*arguments, **keywords)

    monkeypatch.setattr(fused_norms, "_serves", lambda device, dtype: True)
    monkeypatch.setattr(fused_norms, "finish", counted)
    return calls


@pytest.fixture
def in_torch(interpreted: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The same by the definition in torch, which is faster than the interpreter."""
    monkeypatch.setattr(fused_norms, "_fits", lambda *_: False)
    monkeypatch.setattr(fused_norms, "from_tiles", lambda x, video: video.from_tiles(x, 1))
    return interpreted


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    """x [B, S, H * D] in fp64 by the code of diffusers."""
    if kind == "interleaved":
        return ltx2.apply_interleaved_rotary_emb(x, (cos, sin))
    return ltx2.apply_split_rotary_emb(x, (cos, sin))


@pytest.mark.parametrize(
    ("kind", "heads", "head_dim", "dtype"),
    [
        ("interleaved", 3, 12, torch.float32),
        ("interleaved", 5, 4, torch.float16),
        ("split", 2, 10, torch.float32),
        ("split", 3, 6, torch.float16),
    ],
)
def test_kernel_is_the_code_of_diffusers_in_fp64(
    interpreted: list[int], kind: str, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Odd sizes, strided tensors, ragged tiles; what is no token is not written."""
    torch.manual_seed(heads)
    video = VideoLayout((1, 3, 3), TILE, 2, text_first=True)
    batch, tokens, size = 2, video.sequence_length, heads * head_dim
    q, k, v = torch.randn(batch, tokens, 3 * size).to(dtype).chunk(3, -1)
    weights = [(torch.rand(size) + 0.5).to(dtype), None]
    if kind == "split":
        cos, sin = torch.randn(2, batch, heads, tokens, head_dim // 2)
        tables = cos.transpose(1, 2), sin.transpose(1, 2)
    else:
        cos, sin = torch.randn(2, 1, tokens, size)
        tables = heads_of(cos, heads), heads_of(sin, heads)
    deferred = Deferred(weights[0], weights[1], 1e-6, 0.1, *tables, split=kind == "split")
    given = [heads_of(x, heads) for x in (q, k, v)]
    assert fused_norms._fits(*given, deferred)
    got = finish(*given, deferred, video)
    slots = video.raster_slots()
    padding = torch.ones(video.padded_length, dtype=torch.bool)
    padding[slots] = False
    for x, y, weight, eps in zip((q, k), got, weights, (1e-6, 0.1), strict=False):
        normal = torch.nn.RMSNorm(size, eps, elementwise_affine=weight is not None).double()
        if weight is not None:
            normal.weight.data = weight.double()
        with torch.no_grad():
            exact = rotated(normal(x.double()), cos.double(), sin.double(), kind)
        plain = torch.nn.functional.rms_norm(x, (size,), weight, eps)
        plain = rotated(plain, cos, sin, kind)
        y = y[:, slots].flatten(2).double()
        bound = 2 * (plain.double() - exact).abs().max() + 1e-12
        assert (y - exact).abs().max() <= bound
    assert torch.equal(got[2][:, slots].flatten(2), v)
    assert (got[0][:, padding] == 0).all()  # keys and values: tests fill new memory with NaN
    assert all(x[:, padding].isnan().all() for x in got[1:])
    assert torch.equal(from_tiles(got[2], video).flatten(2), v)
    same = finish(*given, deferred)
    assert torch.equal(same[0], got[0][:, slots])


def test_tables_shared_by_heads_are_those_of_wan(interpreted: list[int]) -> None:
    """One table for all heads, [1, S, 1, D]: against diffusers' processor for Wan in fp64."""
    model = MODELS["wan"].model()
    attn = model.blocks[0].attn1.double()
    hidden = torch.randn(1, 5, attn.inner_dim, dtype=torch.float64)
    angles = torch.randn(1, 5, 1, attn.inner_dim // attn.heads // 2, dtype=torch.float64)
    rotary = [f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin)]
    q, k, v = (f(hidden) for f in (attn.to_q, attn.to_k, attn.to_v))
    deferred = Deferred(attn.norm_q.weight.float(), attn.norm_k.weight.float(), attn.norm_q.eps,
                        attn.norm_k.eps, *(x.float() for x in rotary))  # fmt: skip
    with torch.no_grad():
        expected = WanAttnProcessor()(attn, hidden, rotary_emb=tuple(rotary))
        q, k, v = finish(*(heads_of(x.float(), attn.heads) for x in (q, k, v)), deferred)
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.double().transpose(1, 2) for x in (q, k, v))
        )
        got = attn.to_out[0](out.transpose(1, 2).flatten(2))
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["wan", "ltx", "ltx2"])
def test_models_compute_the_same(in_torch: list[int], name: str) -> None:
    """In tile order and in raster order; layers of the model's own attention keep all."""
    tiny = MODELS[name]
    model = tiny.model()
    inputs = tiny.inputs(1)
    dense = output(model, inputs)
    everything = SlidingTile((9, 9, 9), TILE)
    with apply(model, everything):
        assert (output(model, inputs) - dense).abs().max() < 1e-4 * dense.std()
    assert len(in_torch) == tiny.layers
    with apply(model, Radial(block_size=8), fuse_norms=False):
        expected = output(model, inputs)
    assert len(in_torch) == tiny.layers
    with apply(model, Radial(block_size=8)):
        assert (output(model, inputs) - expected).abs().max() < 1e-4 * dense.std()
    assert len(in_torch) == 2 * tiny.layers
    with apply(model, Dense()):
        assert torch.equal(output(model, inputs), dense)
    assert len(in_torch) == 2 * tiny.layers


def test_what_cannot_be_fused_runs_as_it_is(in_torch: list[int]) -> None:
    """Gradients, autocast, a hooked or replaced norm, and a norm of another dtype."""
    tiny = MODELS["wan"]
    model = tiny.model()
    inputs = tiny.inputs(1)
    norm = model.blocks[0].attn1.norm_q
    with apply(model, SlidingTile((9, 9, 9), TILE)):
        model(**inputs, return_dict=False)[0].sum().backward()
        assert norm.weight.grad is not None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output(model, inputs)
        assert not in_torch
        seen: list[int] = []
        hook = norm.register_forward_hook(lambda *_: seen.append(1))
        output(model, inputs)
        assert seen and len(in_torch) == tiny.layers - 1
        hook.remove()
        norm.forward = lambda x: x * 0  # as hooks of accelerate replace it
        assert (output(model, inputs)).isfinite().all()
        assert len(in_torch) == 2 * (tiny.layers - 1)


def test_compiled_code_is_one_graph_for_dense_and_sparse_steps(in_torch: list[int]) -> None:
    """The norms are put off in compiled code, and made up for where a step is dense."""
    from video_attn.integrations import Schedule

    tiny = MODELS["wan"]
    model = tiny.with_config(num_layers=1)
    inputs = tiny.inputs(1)
    dense = output(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    schedule = Schedule(dense_first_steps=1)
    with apply(model, SlidingTile((1, 1, 2), TILE), schedule=schedule, timesteps=[500.0, 400.0]):
        got = output(compiled, inputs)
        later = inputs | {"timestep": torch.full((1,), 400.0)}
        with torch.compiler.set_stance("fail_on_recompile"):
            sparse = output(compiled, later)
        assert len(in_torch) == 2
        expected = output(model, later)
    torch.compiler.reset()
    assert (got - dense).abs().max() < 1e-4 * dense.std()
    assert (sparse - expected).abs().max() < 1e-4 * dense.std()
    assert (sparse - output(model, later)).abs().max() > 1e-3 * dense.std()


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_errors_are_no_larger_than_those_of_the_model(compiled: bool) -> None:
    """Wan with heads of 128 in bf16, against the same model in fp32; ragged tiles."""
    import diffusers

    config = MODELS["wan"].config | {"attention_head_dim": 128, "num_attention_heads": 5}
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**config).eval().cuda()
    inputs = {
        "hidden_states": torch.randn(2, 4, 7, 18, 22, device="cuda"),
        "timestep": torch.full((2,), 500.0, device="cuda"),
        "encoder_hidden_states": torch.randn(2, 6, 16, device="cuda"),
    }
    pattern = SlidingTile((1, 1, 3))
    with apply(model, pattern, fuse_norms=False):
        exact = output(model, inputs)
    model.bfloat16()
    inputs = {name: x if name == "timestep" else x.bfloat16() for name, x in inputs.items()}
    errors = []
    for fused in (False, True):
        with apply(model, pattern, fuse_norms=fused):
            called = torch.compile(model) if compiled else model
            errors.append(float((output(called, inputs).float() - exact).norm() / exact.norm()))
        torch.compiler.reset()
    print(f"relative error in bf16: {errors[0]:.5f} as the model is, {errors[1]:.5f} fused")
    assert errors[1] <= 2 * errors[0]
