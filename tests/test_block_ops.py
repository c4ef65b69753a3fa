"""Block means and exact top-k: against plain definitions, on the device and in the kernels.

Each mistake of the public fused kernels is a case here: padding that enters the mean, slots of
length 0, head dims that are no power of two, more or fewer than k selected, NaN rows, rows of more
than 4096 keys, a tie order that depends on the path.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from video_attn.block_ops import block_mean, select_top_k
from video_attn.kernels import block_pool
from video_attn.kernels.launch import Side, run_launches

# Without a GPU the kernels run in Triton's interpreter.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCORE_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_lens(batch: int, blocks: int, size: int, seed: int = 1) -> Tensor:
    lens = torch.randint(0, size + 1, (batch, blocks), dtype=torch.int32, generator=generator(seed))
    lens[:, 0] = 0
    return lens


def poisoned(x: Tensor, lens: Tensor, size: int) -> Tensor:
    """NaN in every row that is not valid."""
    position = torch.arange(x.shape[2])
    block = position // size
    valid = (position % size) < lens[:, block]
    return torch.where(valid.expand(x.shape[0], -1)[:, None, :, None], x, torch.nan)


def mean_by_definition(x: Tensor, lens: Tensor | None, size: int) -> Tensor:
    blocks = -(-x.shape[2] // size)
    mean = torch.zeros(*x.shape[:2], blocks, x.shape[3], dtype=torch.float64)
    for b in range(x.shape[0]):
        for n in range(blocks):
            rows = x[b, :, n * size : (n + 1) * size].double()
            if lens is not None:
                rows = rows[:, : lens[min(b, lens.shape[0] - 1), n]]
            if rows.shape[1]:
                mean[b, :, n] = rows.mean(1)
    return mean


def kernel_mean(x: Tensor, lens: Tensor | None, size: int) -> Tensor:
    mean = torch.full(
        (*x.shape[:2], -(-x.shape[2] // size), x.shape[3]), torch.nan, dtype=x.dtype, device=DEVICE
    )
    side = Side(size, x.shape[2], None if lens is None else lens.to(DEVICE))
    run_launches([block_pool.block_mean(x.to(DEVICE), mean, side)], DEVICE)
    return mean.cpu()


def kernel_mean_backward(grad: Tensor, lens: Tensor | None, size: int, length: int) -> Tensor:
    shape = (*grad.shape[:2], length, grad.shape[3])
    dx = torch.full(shape, torch.nan, dtype=grad.dtype, device=DEVICE)
    side = Side(size, length, None if lens is None else lens.to(DEVICE))
    run_launches([block_pool.block_mean_backward(grad.to(DEVICE), dx, side)], DEVICE)
    return dx.cpu()


def kernel_top_k(scores: Tensor, top_k: int, lens: Tensor | None = None) -> Tensor:
    indices = torch.full((*scores.shape[:3], top_k), -7, dtype=torch.int32, device=DEVICE)
    lens = None if lens is None else lens.to(DEVICE)
    run_launches([block_pool.select_top_k(scores.to(DEVICE), indices, top_k, lens)], DEVICE)
    return indices.cpu()


def top_k_by_definition(scores: Tensor, top_k: int, lens: Tensor | None = None) -> Tensor:
    scores = scores.double()
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if lens is not None:
        scores = torch.where(lens[:, None, None, :] > 0, scores, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :top_k].sort(dim=-1).values.int()


def agree(scores: Tensor, top_k: int, lens: Tensor | None = None) -> Tensor:
    """Selection of the operator, after comparing it with the kernel and with the definition."""
    selected = select_top_k(scores, top_k, lens)
    assert selected.dtype == torch.int32
    assert torch.equal(selected, top_k_by_definition(scores, top_k, lens))
    assert torch.equal(selected, kernel_top_k(scores, top_k, lens))
    return selected


# -- means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lens_batch", [None, 1, 2])
@pytest.mark.parametrize(
    ("length", "size", "head_dim", "dtype"),
    [
        (128, 64, 40, torch.float32),  # whole blocks
        (100, 64, 72, torch.float16),  # the last block is cut
        (70, 8, 96, torch.float32),
        (300, 100, 3, torch.float64),
        (260, 256, 256, torch.float32),
    ],
)
def test_mean_and_gradient(length, size, head_dim, dtype, lens_batch):
    x = torch.randn(2, 3, length, head_dim, generator=generator()).to(dtype)
    blocks = -(-length // size)
    lens = None if lens_batch is None else random_lens(lens_batch, blocks, size)
    if lens is not None:
        x = poisoned(x, lens, size)
    expected = mean_by_definition(x, lens, size)
    tolerance = {torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for mean in (block_mean(x, lens, size), kernel_mean(x, lens, size)):
        assert mean.dtype == dtype
        assert torch.allclose(mean.double(), expected, rtol=tolerance, atol=tolerance)

    x.requires_grad_()
    weights = torch.randn(expected.shape, generator=generator(2)).to(dtype)
    (dx,) = torch.autograd.grad(block_mean(x, lens, size), x, weights)
    kernel_dx = kernel_mean_backward(weights, lens, size, length)
    clean = x.detach().nan_to_num().double().requires_grad_()
    (expected_dx,) = torch.autograd.grad(
        mean_by_definition_differentiable(clean, lens, size), clean, weights.double()
    )
    for got in (dx, kernel_dx):
        assert torch.allclose(got.double(), expected_dx, rtol=tolerance, atol=tolerance)
        assert torch.equal(got == 0, expected_dx == 0)  # padding gets exactly 0


def mean_by_definition_differentiable(x: Tensor, lens: Tensor | None, size: int) -> Tensor:
    """The mean as a matrix product."""
    blocks = -(-x.shape[2] // size)
    position = torch.arange(x.shape[2])
    member = (position // size == torch.arange(blocks)[:, None]).double()
    if lens is not None:
        member = member * (position % size < lens[:, position // size])[:, None]
    member = member if member.dim() == 3 else member[None]
    member = member / member.sum(-1, keepdim=True).clamp(min=1)
    return member[:, None] @ x


def test_mean_of_a_strided_view():
    memory = torch.randn(2, 100, 3, 50, generator=generator())
    x = memory.transpose(1, 2)[..., 5:45]
    expected = mean_by_definition(x, None, 32)
    assert torch.allclose(block_mean(x, None, 32).double(), expected, atol=1e-6)
    assert torch.allclose(kernel_mean(x, None, 32).double(), expected, atol=1e-6)


def test_mean_of_expanded_gradients():
    x = torch.randn(1, 2, 40, 8, requires_grad=True)
    block_mean(x, None, 16).sum().backward()
    assert torch.allclose(x.grad[:, :, :32], torch.tensor(1 / 16))
    assert torch.allclose(x.grad[:, :, 32:], torch.tensor(1 / 8))


def test_mean_twice_differentiable():
    x = torch.randn(1, 2, 10, 3, dtype=torch.float64, requires_grad=True)
    lens = torch.tensor([[3, 0, 1]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: block_mean(x, lens, 4), x)
    assert torch.autograd.gradgradcheck(lambda x: block_mean(x, lens, 4) ** 2, x)


# -- top-k ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
@pytest.mark.parametrize(("keys", "top_k"), [(7, 3), (48, 48), (100, 1), (768, 76), (5000, 300)])
def test_random_scores(keys, top_k, dtype):
    scores = torch.randn(2, 1, 2, keys, generator=generator(keys)).to(dtype)
    selected = agree(scores, top_k)
    assert (selected.diff(dim=-1) > 0).all()  # exactly top_k different ones, ascending


@pytest.mark.parametrize(
    ("row", "top_k", "expected"),
    [
        ([2.0, 0, 0, 0, 0, 0, -3], 3, [0, 1, 2]),  # bisection of values: six selected
        ([1.0, 1 + 2**-23, 1 + 2**-22, 1 + 3 * 2**-23], 2, [2, 3]),  # neighbours in fp32
        ([10.0, 9.9, 1000.0, 10.1] * 12, 47, [*range(45), 46, 47]),  # an outlier: 49 of 48
        ([5.0] * 9, 4, [0, 1, 2, 3]),  # all equal
        ([-5.0] * 9, 9, list(range(9))),
        ([0.0, -0.0, 0.0, -0.0], 2, [0, 1]),  # -0 ties with 0
        ([-0.0, 1e-45, -1e-45, 0.0], 2, [0, 1]),  # subnormal
        ([torch.nan, 1.0, torch.nan, -torch.inf, 2.0], 2, [1, 4]),
        ([torch.nan, 1.0, torch.nan, 3.0], 3, [0, 1, 3]),  # NaN only where others run out
        ([torch.nan] * 6, 2, [0, 1]),  # an all-NaN row still selects
        ([torch.inf, 1.0, torch.inf, torch.inf], 2, [0, 2]),
        ([-torch.inf, -1e38, -torch.inf, -3e38], 3, [0, 1, 3]),
    ],
)
def test_rows_that_other_kernels_get_wrong(row, top_k, expected):
    selected = agree(torch.tensor(row).view(1, 1, 1, -1), top_k)
    assert selected.flatten().tolist() == expected


@pytest.mark.parametrize("keys", [30, 4500])
def test_many_ties_across_chunks(keys):
    scores = torch.randint(0, 3, (1, 2, 2, keys), generator=generator()).float()
    for top_k in (1, keys // 3, keys // 2, keys - 1, keys):
        agree(scores, top_k)


def test_blocks_of_length_zero_come_last():
    lens = torch.tensor([[0, 5, 0, 1], [3, 0, 0, 0]], dtype=torch.int32)
    scores = torch.tensor([9.0, 1, 8, 2]).expand(2, 1, 1, 4)
    assert agree(scores, 2, lens).tolist() == [[[[1, 3]]], [[[0, 1]]]]
    assert agree(scores, 3, lens[:1]).tolist() == [[[[0, 1, 3]]]] * 2


def test_scores_in_any_memory_order():
    scores = torch.randn(2, 9, 3, 20, generator=generator()).transpose(1, 2)[..., 2:17]
    assert torch.equal(select_top_k(scores, 4), select_top_k(scores.contiguous(), 4))
    agree(scores, 4)
    transposed = torch.randn(1, 1, 20, 9, generator=generator()).transpose(2, 3)
    assert torch.equal(select_top_k(transposed, 4), select_top_k(transposed.contiguous(), 4))


def test_chunks_of_the_torch_code(monkeypatch):
    scores = torch.randn(2, 3, 10, 33, generator=generator())
    whole = select_top_k(scores, 5)
    monkeypatch.setattr("video_attn.backends.reference_blocks._CHUNK", 100)
    assert torch.equal(select_top_k(scores, 5), whole)


def test_same_bits_every_time():
    scores = torch.randn(1, 4, 8, 300, generator=generator()).half()
    assert torch.equal(select_top_k(scores, 31), select_top_k(scores, 31))
    assert torch.equal(kernel_top_k(scores, 31), kernel_top_k(scores, 31))


# -- operators ------------------------------------------------------------------------------------


def test_opcheck():
    lens = torch.tensor([[8, 3, 0]], dtype=torch.int32)
    ops = torch.ops.video_attn
    x = torch.randn(2, 2, 20, 6, requires_grad=True)
    grad = torch.randn(2, 2, 3, 6, requires_grad=True)
    for some_lens in (None, lens):
        opcheck(ops.block_mean.default, (x, some_lens, 8))
        opcheck(ops.block_mean_backward.default, (grad, some_lens, 8, 20))
        opcheck(ops.select_top_k.default, (torch.randn(2, 2, 5, 3), 2, some_lens))


def test_compiles_without_graph_break():
    def selection(x: Tensor) -> Tensor:
        mean = block_mean(x, None, 8)
        return select_top_k(mean @ mean.mT, 2)

    x = torch.randn(1, 2, 40, 16, generator=generator())
    compiled = torch.compile(selection, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), selection(x))


@pytest.mark.gpu
def test_gpu_equals_cpu(gpu):
    x = torch.randn(2, 3, 1000, 128, generator=generator())
    lens = random_lens(2, 16, 64)
    mean = block_mean(x, lens, 64)
    assert torch.allclose(block_mean(x.to(gpu), lens.to(gpu), 64).cpu(), mean, atol=1e-6)
    scores = torch.randn(2, 3, 50, 6000, generator=generator()).bfloat16()
    assert torch.equal(select_top_k(scores.to(gpu), 700).cpu(), select_top_k(scores, 700))


X = torch.zeros(2, 1, 20, 4)
SCORES = torch.zeros(2, 1, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: block_mean(None, None, 8), TypeError, "x must be a Tensor, got NoneType"),
        (lambda: block_mean(X[0], None, 8), ValueError, r"x must be \[B, H, S, D\], got shape"),
        (lambda: block_mean(X.int(), None, 8), TypeError, "x must be float16.* got torch.int32"),
        (lambda: block_mean(X, None, 0), ValueError, "block_size must be >= 1, got 0"),
        (lambda: block_mean(X, None, 8.0), TypeError, "block_size must be an int, got 8.0"),
        (lambda: block_mean(X, None, True), TypeError, "block_size must be an int, got True"),
        (lambda: block_mean(X, X, 8), TypeError, "block_lens must be an int32 tensor"),
        (lambda: block_mean(X, [8, 8, 4], 8), TypeError, "block_lens must be an int32 tensor"),
        (
            lambda: block_mean(X, torch.zeros(2, 4, dtype=torch.int32), 8),
            ValueError,
            r"block_lens must be \[1, 3\] or \[2, 3\], got \(2, 4\)",
        ),
        (
            lambda: block_mean(X, torch.zeros(1, 3, dtype=torch.int32, device="meta"), 8),
            ValueError,
            "block_lens is on meta, but the data is on cpu",
        ),
        (lambda: select_top_k(SCORES[0], 1), ValueError, r"scores must be \[B, H, Nq, Nk\]"),
        (lambda: select_top_k(SCORES.int(), 1), TypeError, "scores must be float16"),
        (lambda: select_top_k(SCORES, 0), ValueError, "top_k must be >= 1, got 0"),
        (lambda: select_top_k(SCORES, 6), ValueError, "at most the number of keys, 5, got 6"),
        (lambda: select_top_k(SCORES, 0.5), TypeError, "top_k must be an int, got 0.5"),
        (
            lambda: select_top_k(SCORES, 1, torch.ones(3, 5, dtype=torch.int32)),
            ValueError,
            r"key_lens must be \[1, 5\] or \[2, 5\], got \(3, 5\)",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
