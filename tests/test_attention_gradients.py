"""Gradients of attention(): any strides, some inputs only, lse alone, no second derivative."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from everywhere import CPU, SMALL, assert_same_bits, bits, build, everywhere
from problem_masks import list_tensors
from problems import Built, run_attention
from torch import Tensor

from video_attn import BlockMask, attention


def answer_with_grad_out(built: Built, backend: str, grad_out: Tensor) -> oracle.Result:
    changed = replace(
        built,
        grad_out=grad_out.contiguous(),
        grad_lse=None,
        kernel_grads=(grad_out, built.kernel_grads[1]),
        problem=replace(built.problem, with_lse_grad=False),
    )
    result = run_attention(changed, backend)
    oracle.check_against_oracle(result, changed, backend)
    return result


@everywhere
def test_grad_out_of_any_strides(backend, device):
    built = build(SMALL, backend, device)
    g = built.grad_out
    answer_with_grad_out(built, backend, torch.tensor(0.7, device=device).expand(g.shape))
    answer_with_grad_out(built, backend, g[:, :1, :1].expand(g.shape))
    answer_with_grad_out(built, backend, g.mT.contiguous().mT)
    answer_with_grad_out(built, backend, torch.cat([g, g], -1)[..., ::2])
    answer_with_grad_out(built, backend, g.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0))


@everywhere
def test_gradients_of_only_some_inputs(backend, device):
    built = build(SMALL, backend, device)
    everything = run_attention(built, backend)
    for wanted in ("q", "k", "v", "qk", "kv", "qv"):
        given = dict(zip("qkv", (x.detach() for x in built.kernel_inputs), strict=True))
        for name in wanted:
            given[name].requires_grad_()
        outputs = attention(
            *given.values(), built.mask, return_lse=True, backend=backend, **built.kernel_options
        )
        torch.autograd.backward(outputs, built.kernel_grads)
        for name, x in given.items():
            if name in wanted:
                assert torch.equal(bits(x.grad), bits(getattr(everything, f"d{name}"))), name
            else:
                assert x.grad is None


@everywhere
def test_lse_alone_has_gradients(backend, device):
    built = build(SMALL, backend, device)
    q, k, v = (x.detach().requires_grad_() for x in built.kernel_inputs)
    _, lse = attention(q, k, v, built.mask, return_lse=True, backend=backend)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), built.kernel_grads[1])
    assert (dv == 0).all(), "lse does not depend on v"
    question = replace(built, grad_out=None)
    oracle.check_against_oracle(oracle.Result(lse=None, out=None, dq=dq, dk=dk), question, backend)


@everywhere
def test_no_grad_and_inference_mode(backend, device):
    built = build(SMALL, backend, device)
    expected = run_attention(built, backend).out
    q, k, v = (x.detach().requires_grad_() for x in built.kernel_inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = attention(q, k, v, built.mask, backend=backend)
        assert not out.requires_grad
        assert torch.equal(bits(out), bits(expected))


@everywhere
def test_one_mask_serves_many_calls(backend, device):
    """The transpose kept by the first backward is right for the second, and other tensors."""
    built = build(SMALL, backend, device)
    first, second = run_attention(built, backend), run_attention(built, backend)
    assert_same_bits(first, second, backend)
    generator = torch.Generator().manual_seed(5)
    others = [
        torch.randn(x.shape, generator=generator).to(device) for x in (built.q, built.k, built.v)
    ]
    case = oracle.Case(*others, built.token_mask, built.scale, built.grad_out)
    q, k, v = (x.detach().requires_grad_() for x in others)
    out, lse = attention(q, k, v, built.mask, backend=backend, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), built.grad_out)
    oracle.check_against_oracle(oracle.Result(out.detach(), lse.detach(), *grads), case, backend)


def test_second_order_gradients_are_refused():
    """The backward operator has none: without an error the result would be silently wrong."""
    built = build(SMALL, "reference", CPU)
    q, k, v = (x.detach().requires_grad_() for x in (built.q, built.k, built.v))
    out = attention(q, k, v, built.mask, backend="reference")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("kind", ["sparse", "dense", "causal"])
def test_gradcheck_in_fp64(kind):
    """Numerical differentiation of the reference, lse included."""
    torch.manual_seed(2)
    q, k, v = (
        torch.randn(2, h, n, d, dtype=torch.float64, requires_grad=True)
        for h, n, d in ((2, 5, 3), (1, 7, 3), (1, 7, 2))
    )
    mask = None
    if kind == "sparse":
        counts, indices = list_tensors([[[{0, 3}, {1, 2}, {2}]]], 4)
        lens = torch.tensor([[2, 1, 2, 1]], dtype=torch.int32)
        mask = BlockMask.from_indices(
            indices, 2, 2, q_len=5, kv_len=7, kv_num_blocks=counts, kv_block_lens=lens
        )

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(
            q, k, v, mask, return_lse=True, is_causal=kind == "causal", backend="reference"
        )

    assert torch.autograd.gradcheck(run, (q, k, v))
