"""Forward-mode differentiation and torch.func: right, or refused by name; never zero in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree
from vsa_definition import means, tile_numbers

import st_attn
import vsa
from video_attn import (
    BlockMask,
    attention,
    named_attention,
    radial,
    sageattn,
    sliding_tile,
    video_sparse,
)
from video_attn.block_ops import block_mean

D = torch.float64
GRID = (3, 4, 5)
KEEP = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
SIZES = torch.tensor([16, 3, 16, 9])

PATTERNS: dict[str, Callable[..., Tensor]] = {
    "sliding_tile": lambda q, k, v: sliding_tile(
        q, k, v, GRID, (1, 2, 1), tile=(2, 2, 2), text_length=5
    ),
    "video_sparse": lambda q, k, v: video_sparse(
        q, k, v, GRID, top_k=3, tile=(2, 2, 2), text_length=5
    ),
    "gate": lambda q, k, v: video_sparse(q, k, v, GRID, top_k=3, tile=(2, 2, 2), gate=0.3),
    "radial": lambda q, k, v: radial(q, k, v, GRID, block_size=16),
    "st_attn": lambda q, k, v: st_attn.sliding_tile_attention(
        q, k, v, (1, 1, 1), 7, True, GRID, tile_size=(2, 2, 2)
    ),
    "vsa": lambda q, k, v: vsa.video_sparse_attn(
        q[:, :, :64], k[:, :, :64], v[:, :, :64], SIZES.to(q.device), 2, 16
    ),
    "block_map": lambda q, k, v: vsa.block_sparse_attn(
        q[:, :, :64], k[:, :, :64], v[:, :, :64], KEEP[None, None].to(q.device), SIZES.to(q.device)
    )[0],
    "causal": lambda q, k, v: attention(q[:, :, 9:], k, v, is_causal=True),
    "fav3": lambda q, k, v: named_attention(q, k, v, "fav3"),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def video() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """q, k, v of a small video with text, and tangents of them."""
    primals = tuple(normal(1, 2, 67, 8, seed=s) for s in range(3))
    return primals, tuple(normal(1, 2, 67, 8, seed=s) for s in range(3, 6))


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_forward_mode(name, video):
    """The tangent is the slope of the function, and agrees with the backward pass."""
    function, (primals, tangents) = PATTERNS[name], video
    out, slope = jvp(function, primals, tangents)
    assert torch.equal(out, function(*primals))
    step = 1e-6
    ahead, behind = (
        function(*(x + sign * step * t for x, t in zip(primals, tangents, strict=True)))
        for sign in (1, -1)
    )
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), atol=2e-8, rtol=1e-6)
    weights = normal(*out.shape, seed=9)
    grads = grad(lambda *x: (function(*x) * weights).sum(), (0, 1, 2))(*primals)
    by_backward = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    torch.testing.assert_close((slope * weights).sum(), by_backward)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_vmap(name, video):
    function, (primals, tangents) = PATTERNS[name], video
    stacked = [torch.stack([x, x + t], 1) for x, t in zip(primals, tangents, strict=True)]
    out = vmap(function, in_dims=1)(*stacked)
    for i in range(2):
        torch.testing.assert_close(out[i], function(*(x[:, i] for x in stacked)))
    each = vmap(grad(lambda q: function(q, *primals[1:]).sin().sum()), in_dims=1)(stacked[0])
    for i in range(2):
        q = stacked[0][:, i].clone().requires_grad_()
        function(q, *primals[1:]).sin().sum().backward()
        torch.testing.assert_close(each[i], q.grad)


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.repeat_interleave(2, 1).mT / 2
    return scores.softmax(-1) @ v.repeat_interleave(2, 1), scores.logsumexp(-1)


Q, K, V = normal(2, 2, 6, 4), normal(2, 1, 7, 4, seed=1), normal(2, 1, 7, 3, seed=2)
T = normal(2, 2, 6, 4, seed=3)
TRANSFORMS: dict[str, Callable[[Callable[..., tuple[Tensor, Tensor]]], object]] = {
    "jvp": lambda f: jvp(f, (Q, K, V), (T, K.cos(), V.cos())),
    "jvp_of_k": lambda f: jvp(lambda k: f(Q, k, V), (K,), (K.cos(),)),
    "grad": lambda f: grad(
        lambda *x: f(*x)[0].sin().sum() + f(*x)[1].cos().sum(), (0, 1, 2)
    )(Q, K, V),
    "jacrev": lambda f: jacrev(lambda q: f(q, K, V)[0])(Q),
    "jacrev_of_lse": lambda f: jacrev(lambda k: f(Q, k, V)[1])(K),
    "jacfwd": lambda f: jacfwd(lambda q: f(q, K, V)[0])(Q),
    "vmap": lambda f: vmap(f, (1, None, 2))(torch.stack([Q, T], 1), K, torch.stack([V, -V], 2)),
    "vmap_grad": lambda f: vmap(grad(lambda q: f(q, K, V)[0].sin().sum()))(torch.stack([Q, T])),
    "grad_vmap": lambda f: grad(
        lambda q: vmap(lambda q: f(q, K, V)[0])(torch.stack([q, q + 1])).sin().sum()
    )(Q),
    "vmap_jvp": lambda f: vmap(lambda q: jvp(lambda q: f(q, K, V)[0], (q,), (T,)))(
        torch.stack([Q, T])
    ),
    "jvp_vmap": lambda f: jvp(
        lambda q: vmap(lambda q: f(q, K, V)[0])(torch.stack([q, q + 1])), (Q,), (T,)
    ),
    # As consistency and mean-flow models train: the tangent is a constant of the loss.
    "grad_beside_jvp": lambda f: grad(
        lambda q: (lambda out, slope: (out * slope.detach()).sum())(
            *jvp(lambda q: f(q, K, V)[0], (q,), (T,))
        )
    )(Q),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    transform = TRANSFORMS[name]
    got = transform(lambda q, k, v: attention(q, k, v, return_lse=True))
    for x, y in zip(pytree.tree_leaves(got), pytree.tree_leaves(transform(dense)), strict=True):
        torch.testing.assert_close(x, y)


def test_vmap_over_masks():
    keep = torch.stack([KEEP[None, None], ~KEEP[None, None]])
    masks = [BlockMask.from_dense(x, 16, 16, kv_block_lens=SIZES[None].int()) for x in keep]
    both = pytree.tree_map(lambda *x: torch.stack(x), *masks)
    q = normal(1, 2, 64, 8)
    out = vmap(lambda mask: attention(q, q, q, mask))(both)
    for i in range(2):
        torch.testing.assert_close(out[i], attention(q, q, q, masks[i]))


def test_vmap_over_gradients_of_an_operator():
    """One mask with one list serves all batches: its tensors stay as they are."""
    mask = BlockMask.from_dense(KEEP[None, None], 16, 16, kv_block_lens=SIZES[None].int())
    q, lists = normal(2, 2, 64, 8), mask.as_arguments(True)
    out, lse = torch.ops.video_attn.attention_forward(
        q, q, q, *lists, 0.3, False, "native", False, "reference"
    )

    def gradients(grad_out: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.video_attn.attention_backward(
            grad_out, None, q, q, q, out, lse, *lists, 0.3, False, True, "reference"
        )

    both = torch.stack([out, out.cos()])
    for got, *each in zip(vmap(gradients)(both), *map(gradients, both), strict=True):
        torch.testing.assert_close(got, torch.stack(each))


def test_tangents_in_every_precision_of_the_tensors():
    """fp32 in the sums, the tensors' own dtype in the result; also without gradients."""
    tangent = normal(2, 2, 6, 4, seed=5)
    _, expected = jvp(lambda q: dense(q, K, V)[0], (Q,), (tangent,))
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        q, k, v, t = (x.to(dtype) for x in (Q, K, V, tangent))
        with torch.no_grad(), forward_ad.dual_level():
            out = attention(forward_ad.make_dual(q, t), k, v)
            slope = forward_ad.unpack_dual(out).tangent
            assert slope is not None and slope.dtype == dtype
            assert (slope - expected).norm() <= limit * expected.norm()


def test_padding_is_never_read(poison=float("nan")):
    """NaN in keys and queries past the valid ones, and in their tangents, stays where it is."""
    lens = torch.tensor([[16, 3, 0, 9]], dtype=torch.int32)
    mask = BlockMask.from_dense(KEEP[None, None], 16, 16, lens, lens)
    padding = ~(torch.arange(16) < lens[0, :, None]).flatten()[:, None]
    clean = [normal(1, 1, 64, 8, seed=s).masked_fill(padding, 0) for s in range(6)]
    dirty = [x.masked_fill(padding, poison) for x in clean]
    expected, got = (
        jvp(lambda *x: attention(*x, mask), tuple(x[:3]), tuple(x[3:])) for x in (clean, dirty)
    )
    for x, y in zip(expected, got, strict=True):
        assert torch.equal(x, y)


def test_means_of_blocks():
    x, t = normal(1, 2, 10, 4), normal(1, 2, 10, 4, seed=1)
    lens = torch.tensor([[4, 1, 2]], dtype=torch.int32)
    assert torch.equal(jvp(lambda x: block_mean(x, lens, 4), (x,), (t,))[1], block_mean(t, lens, 4))
    matrix = jacrev(lambda x: block_mean(x, lens, 4))(x)
    assert torch.equal(matrix, jacfwd(lambda x: block_mean(x, lens, 4))(x))
    assert torch.equal(matrix[0, 0, 1, 0, 0, 0, 4:8, 0], torch.tensor([1.0, 0, 0, 0], dtype=D))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: hessian(f)(Q),
        lambda f: grad(lambda q: grad(f)(q).sum())(Q),
        lambda f: grad(lambda q: jvp(f, (q,), (T,))[1])(Q),
        lambda f: jvp(grad(f), (Q,), (T,)),
        lambda f: jvp(lambda q: jvp(f, (q,), (T,))[1], (Q,), (T,)),
    ],
    ids=["hessian", "grad_grad", "grad_jvp", "jvp_grad", "jvp_jvp"],
)
def test_second_derivatives_are_refused(transform):
    with pytest.raises(RuntimeError, match="no second derivative|Nested forward mode"):
        transform(lambda q: attention(q, K, V).sin().sum())


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jvp(f, (Q.float(),), (T.float(),)),
        lambda f: torch.no_grad()(jvp)(f, (Q.float(),), (T.float(),)),
        lambda f: grad(f)(Q.float()),
        lambda f: grad(lambda q: vmap(f)(torch.stack([q, q])).sum())(Q.float()),
        lambda f: jvp(lambda q: vmap(f)(torch.stack([q, q])), (Q.float(),), (T.float(),)),
    ],
    ids=["jvp", "jvp_no_grad", "grad", "grad_vmap", "jvp_vmap"],
)
@pytest.mark.parametrize("function", [sageattn, named_attention])
def test_quantized_attention_has_no_derivative(transform, function):
    name = ("sagev1",) if function is named_attention else ()

    def run(q: Tensor) -> Tensor:
        return function(q, K.float(), V.float(), *name).sin().sum()

    with pytest.raises(ValueError, match="no backward pass and no forward-mode derivative"):
        transform(run)
    q = torch.stack([Q.float(), T.float()])
    assert vmap(lambda q: function(q, K.float(), V.float(), *name))(q).shape == (2, 2, 2, 6, 3)


# Tile (or block) of each token, -1 for one in no tile, and how many tiles a tile chooses.
CHOICES = {
    "video_sparse": (tile_numbers(GRID, (2, 2, 2)), 3),
    "gate": (tile_numbers(GRID, (2, 2, 2)), 3),
    "vsa": ([i // 16 if i % 16 < SIZES[i // 16] else -1 for i in range(64)], 2),
}


def inputs_with_clear_choices(name: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and tangents, such that rounded means choose the tiles that exact ones choose."""
    for seed in range(3000):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(1, 2, 67, 8, generator=generator).to(dtype) for _ in range(6)]
        if name not in CHOICES:
            return inputs
        numbers, top_k = CHOICES[name]
        q, k = (means(x[:, :, : len(numbers)].double(), [numbers], 12)[0] for x in inputs[:2])
        count = max(numbers) + 1
        scores = (q @ k.mT)[..., :count, :count].sort(-1, descending=True).values
        size = (q.abs() @ k.abs().mT).max()
        gap = (scores[..., top_k - 1] - scores[..., top_k]).min()
        # The roundings of a score's summands, half an epsilon each at most, do not add up.
        if gap > torch.finfo(dtype).eps / 2 * size:
            return inputs
    raise AssertionError("no seed separates the scores")


@pytest.mark.parametrize("name", CHOICES)
def test_clear_choices_survive_rounding(name):
    """In bf16 the same tiles are chosen as in fp64 from the same inputs, so slopes are close."""
    inputs = inputs_with_clear_choices(name, torch.bfloat16)
    exact = [x.double() for x in inputs]
    _, expected = jvp(PATTERNS[name], tuple(exact[:3]), tuple(exact[3:]))
    _, slope = jvp(PATTERNS[name], tuple(inputs[:3]), tuple(inputs[3:]))
    assert (slope.double() - expected).norm() <= 3e-2 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_forward_mode_on_a_gpu(name, dtype, gpu):
    """A second pass over the lists, whichever backend ran the first one."""
    inputs = inputs_with_clear_choices(name, dtype)
    exact = [x.double() for x in inputs]
    _, expected = jvp(PATTERNS[name], tuple(exact[:3]), tuple(exact[3:]))
    on_gpu = [x.to(gpu) for x in inputs]
    out, slope = jvp(PATTERNS[name], tuple(on_gpu[:3]), tuple(on_gpu[3:]))
    assert slope.dtype == dtype and slope.device == out.device
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    assert (slope.double().cpu() - expected).norm() <= limit * expected.norm()


@pytest.mark.gpu
def test_a_cuda_graph_sees_lists_that_are_written_in_place(gpu):
    """Forward and backward captured once; then other lists in the same memory."""
    first, second = (
        BlockMask.from_dense(keep[None, None].to(gpu), 64, 64) for keep in (KEEP, KEEP.flip(0))
    )
    mask = first.clone()
    q = torch.randn(1, 2, 256, 64, device=gpu, dtype=torch.bfloat16, requires_grad=True)

    def train() -> Tensor:
        return torch.autograd.grad(attention(q, q, q, mask).float().square().sum(), q)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad_q = train()
    for other in (second, first):
        mask.kv_indices.copy_(other.kv_indices)
        mask.kv_num_blocks.copy_(other.kv_num_blocks)
        graph.replay()
        torch.cuda.synchronize()
        expected = torch.autograd.grad(attention(q, q, q, other).float().square().sum(), q)[0]
        assert torch.equal(grad_q, expected)
