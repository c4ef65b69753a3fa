"""straight_through: a quantized forward pass with the gradients of unquantized attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from video_attn import (
    BlockMask,
    VideoLayout,
    attention,
    sageattn,
    sageattn_varlen,
    sliding_tile,
)
from video_attn.block_mask import mask_arguments
from video_attn.ops import backward_backend
from video_attn.quantize import QUANTIZED_PRECISIONS, QuantizationOptions, parse_recipe

# Relative L2 error of out, lse and gradients: some roundings of the codes (docs/sage_notes.md).
BOUNDS = {"sage_fp16": 0.03, "sage_fp8": 0.08, "fp8": 0.1}


def smooth(heads: int, tokens: int, dim: int, seed: int, speed_limit: float = 0.5) -> Tensor:
    """Slow waves over the tokens, like neighbouring tokens of a video: [1, heads, tokens, dim]."""
    generator = torch.Generator().manual_seed(seed)
    speed, phase = torch.rand(2, 1, heads, 1, dim, generator=generator)
    return torch.sin(torch.arange(tokens)[:, None] * speed * speed_limit + 6.3 * phase)


# GQA; the second block of queries sees nothing.
QKV = smooth(2, 6, 16, 1), smooth(1, 7, 16, 2), smooth(1, 7, 8, 3, 3.0)
KEEP = torch.tensor([True, False])[None, None, :, None]
MASK = BlockMask.from_dense(KEEP, 4, 7, q_len=6, kv_len=7)
WEIGHTS = smooth(2, 6, 8, 4)


def loss_of(out: Tensor) -> Tensor:
    return (out * WEIGHTS.to(out.dtype)).sum() + out.square().sum()


def gradients(**options: object) -> tuple[Tensor, ...]:
    tensors = [x.clone().requires_grad_() for x in QKV]
    out = attention(*tensors, MASK, **options)  # type: ignore[call-overload]
    return torch.autograd.grad(loss_of(out), tensors)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def by_differences(which: int, step: float = 1e-4) -> Tensor:
    """The gradient of unquantized attention by central differences in fp64, element by element."""
    exact = [x.double() for x in QKV]
    found = torch.zeros_like(exact[which])
    for i in range(found.numel()):
        values = []
        for sign in (1, -1):
            moved = exact[which].clone()
            moved.view(-1)[i] += sign * step
            out = attention(*exact[:which], moved, *exact[which + 1 :], MASK)
            values.append(loss_of(out))
        found.view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return found


def test_gradients_are_the_finite_differences_of_unquantized_attention():
    expected = [by_differences(which) for which in range(3)]
    for precision in QUANTIZED_PRECISIONS:
        got = gradients(precision=precision, straight_through=True)
        for name, x, y in zip(("dq", "dk", "dv"), got, expected, strict=True):
            assert x.dtype == torch.float32
            assert relative(x, y) < BOUNDS[precision], f"{precision}, {name}"
        assert (got[0][:, :, 4:] == 0).all()  # rows that see nothing


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_forward_is_quantized_and_backward_takes_its_lse(precision):
    tensors = [x.clone().requires_grad_() for x in QKV]
    out, lse = attention(
        *tensors, MASK, precision=precision, straight_through=True, return_lse=True
    )
    with torch.no_grad():
        expected = attention(*QKV, MASK, precision=precision, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    got = torch.autograd.grad(loss_of(out), tensors)
    grad_out = (WEIGHTS + 2 * out).detach()
    again = torch.ops.video_attn.attention_backward(
        grad_out, None, *QKV, out.detach(), lse.detach(), *mask_arguments(MASK),
        16**-0.5, False, False, None,
    )  # fmt: skip
    for x, y in zip(got, again, strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-7)


def test_in_the_dtype_of_the_inputs():
    tensors = [x.bfloat16().requires_grad_() for x in QKV]
    out = attention(*tensors, MASK, precision="sage_fp8", straight_through=True)
    expected = gradients()
    for x, y in zip(torch.autograd.grad(loss_of(out), tensors), expected, strict=True):
        assert x.dtype == torch.bfloat16 and relative(x, y) < BOUNDS["sage_fp8"] + 0.01


def test_other_derivatives():
    """Forward mode, transforms and compiled code."""

    def run(q: Tensor, **options: object) -> Tensor:
        return attention(q, *QKV[1:], **options)  # type: ignore[call-overload]

    options = {"precision": "sage_fp16", "straight_through": True}
    tangent = smooth(2, 6, 16, 5)
    exact = jvp(run, (QKV[0],), (tangent,))[1]
    got = jvp(lambda q: run(q, **options), (QKV[0],), (tangent,))[1]
    assert relative(got, exact) < BOUNDS["sage_fp16"]

    expected = grad(lambda q: loss_of(run(q)))(QKV[0])
    assert relative(grad(lambda q: loss_of(run(q, **options)))(QKV[0]), expected) < 0.03
    pair = torch.stack([QKV[0], QKV[0]])
    mapped = grad(lambda q: vmap(lambda x: loss_of(run(x, **options)))(q).sum())(pair)
    assert relative(mapped[1], expected) < 0.03

    compiled = torch.compile(
        lambda q: loss_of(run(q, **options)), fullgraph=True, backend="aot_eager"
    )
    q = QKV[0].clone().requires_grad_()
    assert relative(torch.autograd.grad(compiled(q), q)[0], expected) < 0.03


def test_through_the_functions_for_models():
    """sageattn, packed sequences, patterns; options as a recipe, as models are given them."""
    q, k, v = (x.clone().requires_grad_() for x in (*QKV[:2], smooth(1, 7, 16, 9, 3.0)))
    expected = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    ends = torch.tensor([0, 6]), torch.tensor([0, 7])
    for out in (
        sageattn(q, k, v, straight_through=True),
        sageattn_varlen(
            *(x[0].transpose(0, 1) for x in (q, k, v)), *ends, 6, 7, straight_through=True
        ),
    ):
        got = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert max(map(relative, got, expected)) < BOUNDS["sage_fp8"]

    layout = VideoLayout((2, 4, 4), (1, 2, 2))
    q, k, v = (smooth(2, 32, 16, seed, 3.0).requires_grad_() for seed in (6, 7, 8))
    results = []
    for options in ({}, {"precision": "sage_fp16", "straight_through": True}):
        out = sliding_tile(q, k, v, layout.grid, (1, 1, 1), tile=layout.tile, **options)
        results.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert max(map(relative, results[1], results[0])) < BOUNDS["sage_fp16"]

    options = parse_recipe("sage_fp8:straight_through=True")[1]
    assert options == QuantizationOptions(straight_through=True)
    assert gradients(precision="sage_fp8", quantization=options)[0].norm() > 0


def test_the_backend_of_the_backward_pass():
    """A backend without a backward pass leaves it to the others; nothing else changes hands."""
    assert backward_backend("sage_fp8:straight_through=True", "cuda_sage") is None
    assert backward_backend("sage_fp8:straight_through=True", "reference") == "reference"
    assert backward_backend("native", "cuda_sage") == "cuda_sage"
    assert gradients(precision="fp8", straight_through=True, backend="reference")[0].norm() > 0


def test_it_is_refused_where_it_has_no_meaning():
    with pytest.raises(ValueError, match="straight_through is for quantized precisions.*'native'"):
        attention(*QKV, straight_through=True)
    with pytest.raises(TypeError, match="straight_through must be True or False, got 1"):
        attention(*QKV, precision="fp8", straight_through=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="straight_through must be True or False, got None"):
        sageattn(*QKV, straight_through=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Use straight_through=True"):
        gradients(precision="sage_fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_on_a_gpu(precision, gpu):
    """bf16, whichever backends serve the two passes."""
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, 500, 64, dtype=torch.bfloat16, device=gpu) for heads in (4, 2, 2)]
    mask = BlockMask.from_dense(
        torch.rand(1, 1, 8, 8, device=gpu) < 0.6, 64, 64, q_len=500, kv_len=500
    )
    results = []
    for options in ({}, {"precision": precision, "straight_through": True}):
        tensors = [x.clone().requires_grad_() for x in qkv]
        out = attention(*tensors, mask, **options)
        results.append(torch.autograd.grad(out.float().square().sum(), tensors))
    with torch.no_grad():
        assert torch.equal(out, attention(*qkv, mask, precision=precision))
    for x, y in zip(*results, strict=True):
        assert x.isfinite().all() and relative(y, x) < 2 * BOUNDS[precision]
