"""A call like an earlier one takes a shorter road, which nobody must notice."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from video_attn import BlockMask, attention, registry, seen_calls, use_backend
from video_attn.calls import ForwardCall
from video_attn.quantize import QuantizationOptions
from video_attn.registry import Backend, Problem

checks = sys.modules["video_attn.attention"]  # the package has a function of that name
B, H, S, D, BLOCK = 1, 2, 48, 16, 16


@pytest.fixture(autouse=True)
def nothing_seen():
    seen_calls._seen.clear()


def tensors(*shape: int, heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, *(shape or (B, H, S, D)))
    return q, k[:, :heads], v[:, :heads]


def mask_of(
    seed: int = 0, batch: int = 1, heads: int = 1, lens: bool = False, block: int = BLOCK,
    kv_len: int = S,
) -> BlockMask:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, heads, 3, 3, generator=generator) < 0.6
    valid = torch.randint(1, BLOCK, (1, 3), generator=generator, dtype=torch.int32)
    lengths = [valid if lens else None] * 2
    return BlockMask.from_dense(keep, block, block, *lengths, q_len=S, kv_len=kv_len)


@pytest.fixture
def checked(monkeypatch) -> list[int]:
    """Grows by every call that is checked."""
    calls: list[int] = []
    check = checks.checked_call

    def counting(*args, **options):
        calls.append(1)
        return check(*args, **options)

    monkeypatch.setattr(checks, "checked_call", counting)
    return calls


SAME = {
    "dense": {},
    "causal": {"is_causal": True, "return_lse": True},
    "bshd": {"layout": "bshd", "return_lse": True},
    "a scale": {"scale": 0.3},
    "lists": {"mask": mask_of()},
    "lists of heads, with lengths": {"mask": mask_of(1, heads=H, lens=True), "return_lse": True},
    "quantized": {"precision": "sage_fp16", "backend": "cpu"},
    "options": {"precision": "fp8", "quantization": QuantizationOptions(smooth_k=False)},
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME.keys())
def test_the_second_call_is_like_the_first_and_is_not_checked_again(options, checked):
    given = tensors() if options.get("layout") != "bshd" else tensors(B, S, H, D)
    with torch.no_grad():
        first = attention(*given, **options)
        assert len(seen_calls._seen) == len(checked) == 1
        second = attention(*given, **options)
    assert len(checked) == 1
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_values_are_of_each_call(checked):
    """Signatures say nothing of values: neither of q, k, v nor of the lists of a mask."""
    masks = [mask_of(seed) for seed in range(4)]
    for mask in masks:
        given = tensors()
        expected = attention(*given, mask, backend="reference")
        torch.testing.assert_close(attention(*given, mask), expected)
    own = masks[0].clone()
    own.kv_num_blocks.fill_(1)
    own.kv_indices[..., 0] = 2
    torch.testing.assert_close(attention(*given, own), attention(*given, own, backend="reference"))
    assert len(checked) == 2  # one signature, on two backends


WRONG: dict[str, Callable[..., object]] = {
    "flag": lambda q, k, v: attention(q, k, v, is_causal=0),
    "deterministic": lambda q, k, v: attention(q, k, v, deterministic=0),
    "straight_through": lambda q, k, v: attention(q, k, v, straight_through=0),
    "return_lse": lambda q, k, v: attention(q, k, v, return_lse=0),
    "scale": lambda q, k, v: attention(q, k, v, scale=True),
    "zero scale": lambda q, k, v: attention(q, k, v, scale=0.0),
    "precision": lambda q, k, v: attention(q, k, v, precision="int3"),
    "backend": lambda q, k, v: attention(q, k, v, backend="none such"),
    "quantization": lambda q, k, v: attention(q, k, v, quantization={}),
    "quantization of native": lambda q, k, v: attention(
        q, k, v, quantization=QuantizationOptions()
    ),
    "layout": lambda q, k, v: attention(q, k, v, layout="sbhd"),
    "another order": lambda q, k, v: attention(q, k.mT, v),
    "no tensor": lambda q, k, v: attention(q, k, None),
    "dtype": lambda q, k, v: attention(q, k.half(), v),
    "device": lambda q, k, v: attention(q, k, v.to("meta")),
    "tokens": lambda q, k, v: attention(q, k[:, :, 1:], v),
    "heads": lambda q, k, v: attention(q[:, :1], k, v),
    "dimensions": lambda q, k, v: attention(q, k, v[0]),
    "strides": lambda q, k, v: attention(q, k, v.mT.contiguous().mT),
    "mask": lambda q, k, v: attention(q, k, v, mask_of().to_dense()),
    "causal mask": lambda q, k, v: attention(q, k, v, mask_of(), is_causal=True),
    "heads of a mask": lambda q, k, v: attention(q, k, v, mask_of(heads=3)),
    "batch of a mask": lambda q, k, v: attention(q, k, v, mask_of(batch=2)),
    "tokens of a mask": lambda q, k, v: attention(q, k, v, mask_of(kv_len=S - 1)),
    "length of a mask": lambda q, k, v: attention(q, k[:, :, :-1], v[:, :, :-1], mask_of()),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_an_error_comes_after_a_like_call_too(wrong):
    given = tensors()
    with pytest.raises((TypeError, ValueError)) as fresh:
        wrong(*given)
    attention(*given)
    attention(*given, mask_of())
    attention(*given, scale=1.0)
    for _ in range(2):  # nor is what failed taken for seen
        with pytest.raises(type(fresh.value)) as again:
            wrong(*given)
        assert str(again.value) == str(fresh.value)


# -- who watches sees the operators ----------------------------------------------------------------


class Watcher(TorchDispatchMode):
    """The names of all operators below it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor that some other package made."""


def test_modes_and_subclasses_see_the_operator():
    given = tensors()
    expected = attention(*given)
    with Watcher() as watcher:
        torch.testing.assert_close(attention(*given), expected, rtol=0, atol=0)
    assert "video_attn::attention_forward" in watcher.names
    q, k, v = (x.as_subclass(Subclass) for x in given)
    assert type(attention(q, k, v)) is Subclass
    assert attention(*(x.to("meta") for x in given)).device.type == "meta"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(attention(*(mode.from_tensor(x) for x in given))) is not Tensor


def test_transforms_and_tangents_after_a_like_call():
    q, k, v = given = tensors()
    expected = attention(*given)
    with forward_ad.dual_level():
        out = attention(forward_ad.make_dual(q, torch.randn_like(q)), k, v)
        assert forward_ad.unpack_dual(out).tangent is not None
    outs = torch.func.vmap(attention)(*(torch.stack([x, 2 * x]) for x in given))
    torch.testing.assert_close(outs[0], expected)
    grad = torch.func.grad(lambda x: attention(x, k, v).sum())(q)
    assert grad.shape == q.shape and grad.abs().sum() > 0


def test_gradients_after_a_like_call_without():
    q, k, v = tensors()
    with torch.no_grad():
        expected = attention(q, k, v, mask_of())
        quantized = attention(q, k, v, precision="sage_fp16")
    q.requires_grad_()
    for _ in range(2):
        out = attention(q, k, v, mask_of())
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        (grad,) = torch.autograd.grad(out.sum(), q)
        wanted = attention(q, k, v, mask_of(), backend="reference")
        torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), q)[0])
    with pytest.raises(ValueError, match="backward"):
        attention(q, k, v, precision="sage_fp16")
    with torch.no_grad():
        again = attention(q, k, v, precision="sage_fp16")
    torch.testing.assert_close(again, quantized, rtol=0, atol=0)


# -- whose backend ---------------------------------------------------------------------------------


def test_the_choice_of_a_backend_is_made_anew_where_it_must_be(monkeypatch):
    ran: list[str] = []

    def backend(name: str, priority: int) -> Backend:
        def forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
            ran.append(name)
            out, lse = call.empty_results()
            return out.zero_(), lse.zero_()

        def supports(problem: Problem) -> str | None:
            return "too large" if name == "fast" and problem.kv_block_size == 20 else None

        return Backend(name, priority, lambda: None, supports, forward)

    rows = {x.name: x for x in (backend("slow", 1), backend("fast", 2))}
    monkeypatch.setattr(registry, "_backends", rows)
    registry.forget_choices()
    given = tensors()
    try:
        for _ in range(2):
            attention(*given)
            attention(*given, backend="slow")
            with use_backend("slow"):
                attention(*given)
                attention(*given, backend="fast")
            with monkeypatch.context() as patch:
                patch.setenv("VIDEO_ATTN_BACKEND", "slow")
                attention(*given)
            for block in (BLOCK, 20):  # as many blocks of either
                attention(*given, mask_of(block=block))
        registry.register(backend("faster", 3))
        attention(*given)
    finally:
        registry.forget_choices()
    assert ran == ["fast", "slow", "slow", "fast", "slow", "fast", "slow"] * 2 + ["faster"]


@pytest.mark.gpu
def test_devices_are_a_part_of_the_signature(gpu):
    here, there = tensors(), [x.to(gpu) for x in tensors()]
    for given in (there, here, there):
        assert attention(*given).device == given[0].device
    attention(*there, mask_of().to(gpu))
    with pytest.raises(ValueError, match="k must be on the device of q"):
        attention(there[0], here[1], there[2])
    with pytest.raises(ValueError, match="mask is on cpu"):
        attention(*there, mask_of())


# -- what is kept ----------------------------------------------------------------------------------


def test_no_tensor_is_kept_and_not_without_end(monkeypatch):
    monkeypatch.setattr(seen_calls, "_MOST", 4)
    mask = mask_of(7)
    alive = [weakref.ref(mask), weakref.ref(mask.kv_indices)]
    for length in range(S, S + 9):
        q, k, v = tensors(B, H, length, D)
        attention(q, k[:, :, :S], v[:, :, :S])
        assert 0 < len(seen_calls._seen) <= 4
    attention(q[:, :, :S], k[:, :, :S], v[:, :, :S], mask)
    alive += [weakref.ref(x) for x in (q, k, v)]
    del q, k, v, mask
    gc.collect()
    assert [x() for x in alive] == [None] * len(alive)


def test_no_tokens_are_not_a_backends_work(checked):
    q, k, v = tensors()
    for _ in range(2):
        assert attention(q, k[:, :, :0], v[:, :, :0]).abs().sum() == 0
        assert attention(q[:, :, :0], k, v).shape == (B, H, 0, D)
    assert len(checked) == 4
