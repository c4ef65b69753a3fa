"""Which tiles video sparse attention keeps: exactly k, by score, ties to the lower index."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from video_cases import answer, random_qkv, spy_on_masks

from video_attn import BlockMask, video_sparse
from video_attn.patterns.video_sparse import kept_blocks
from vsa import video_sparse_attn

pytestmark = pytest.mark.usefixtures("on_quick_backend")


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """The block masks that the functions attended with, in order."""
    return spy_on_masks(monkeypatch)


# -- selection -------------------------------------------------------------------------------------


def with_scores(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in blocks of one token whose block scores are ``scores`` [Nq, Nk] exactly."""
    rows, columns = scores.shape
    q, k = torch.zeros(1, 1, rows, 4 * rows), torch.zeros(1, 1, columns, 4 * rows)
    q[0, 0, :, :rows] = torch.eye(rows) * 2 * math.sqrt(rows)  # scale is 1 / (2 sqrt(rows))
    k[0, 0, :, :rows] = scores.T
    return q, k, torch.randn(1, 1, columns, 8)


OUTLIERS = torch.randn(60, 48, generator=torch.Generator().manual_seed(3)) * 3 + 10
OUTLIERS[torch.arange(60), torch.arange(60) % 48] = 1000.0
NEAR_TIES = torch.tensor([[1.0, 1 + 2**-23, 1 + 2**-23, 1 + 2**-22, 1.0]])
NAN = math.nan
SELECTIONS = {
    "threshold_never_hit": ([[2.0, 0, 0, 0, 0, 0, -3]], 3, [[0, 1, 2]]),
    "all_equal": ([[0.0] * 9] * 2, 4, [[0, 1, 2, 3]] * 2),
    "near_ties": (NEAR_TIES, 2, [[1, 3]]),
    "ties_at_the_boundary": ([[5.0, 1, 3, 3, 7, 3]], 3, [[0, 2, 4]]),
    "nan_is_never_preferred": ([[NAN, -5.0, 2, NAN, 1]], 3, [[1, 2, 4]]),
    "nan_only_when_needed": ([[1.0, NAN, NAN, -math.inf]], 3, [[0, 1, 2]]),
    "one": ([[1.0, 3, 2]], 1, [[1]]),
    "all": ([[1.0, 3, 2]], 3, [[0, 1, 2]]),
    "infinite": ([[-math.inf, 1.0, 0.0, math.inf]], 2, [[1, 3]]),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_exactly_k_tiles_lowest_index_first(name, masks):
    """Exactly k tiles, ties to the lower index, NaN as -inf.

    Bug class: a bisected threshold that keeps 6 tiles for k = 3 when no score equals it.
    """
    scores, top_k, expected = SELECTIONS[name]
    q, k, v = with_scores(torch.as_tensor(scores))
    # A NaN or infinite key would reach every score of its row through 0 * NaN: one row, one column.
    if not bool(torch.as_tensor(scores).isfinite().all()):
        q, k = q[..., :4].contiguous(), k[..., :4].contiguous()
        q[..., 1:], k[..., 1:] = 0, 0
        k[..., 0] = torch.as_tensor(scores)[0]
        q[..., 0] = 2
    video_sparse_attn(q, k, v, None, top_k, 1, 0)
    dense = masks[-1].to_dense()[0, 0]
    assert [row.nonzero().flatten().tolist() for row in dense] == expected


def test_outliers_do_not_change_the_count(masks):
    """A score of 1000 among scores near 10 leaves the count, and the choice of the rest, alone."""
    q, k, v = with_scores(OUTLIERS)
    video_sparse_attn(q, k, v, None, 24, 1, 0)
    dense = masks[-1].to_dense()[0, 0]
    assert (dense.sum(-1) == 24).all()
    best = OUTLIERS.sort(dim=-1, descending=True, stable=True).indices[:, :24].sort(-1).values
    assert torch.equal(dense.nonzero()[:, 1].view(60, 24), best)


def test_more_than_4096_tiles(masks):
    """5000 equal scores: the first k, as for few tiles."""
    q, k, v, _ = random_qkv((1, 1, 2, 8), kv_len=5000)
    video_sparse_attn(torch.zeros_like(q), k, v, None, 7, 1, 0)
    assert masks[-1].kv_indices.tolist() == [[[list(range(7))] * 2]]


def test_nan_in_a_key_shows(masks):
    """NaN data are not hidden: a tile of NaN is not chosen, but the coarse branch shows it."""
    q, k, v, _ = random_qkv((1, 1, 4 * 8, 8))
    k[:, :, 8:16] = torch.nan
    assert bool(video_sparse_attn(q, k, v, None, 3, 8, 0).isfinite().all())
    assert masks[-1].to_dense()[0, 0, :, 1].sum() == 0
    assert bool(video_sparse_attn(q, k, v, None, 3, 8).isnan().all())


RATIOS = [
    (0.29, 100, 29), (0.57, 100, 57), (0.1, 96, 10), (1 - 0.9, 100, 10), (1 - 0.7, 100, 30),
    (1 / 3, 96, 32), (2 / 3, 96, 64), (0.3, 336, 101), (0.5, 7, 4), (1.0, 5, 5), (1, 5, 5),
    (1e-9, 50, 1), (0.999999, 96, 96), (Fraction(2, 7), 14, 4), (0.0625, 768, 48),
]  # fmt: skip


@pytest.mark.parametrize(("ratio", "blocks", "expected"), RATIOS)
def test_kept_blocks_has_no_float_trap(ratio, blocks, expected):
    """ratio * n as the user wrote it, rounded up: 0.29 of 100 is 29, 1 - 0.7 of 100 is 30."""
    assert kept_blocks(ratio, blocks) == expected


@given(top=st.integers(1, 1000), bottom=st.integers(1, 1000), blocks=st.integers(1, 2000))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_kept_blocks_of_any_fraction(top, bottom, blocks):
    """For a ratio a / b given as a float: ceil(a * n / b) in integers, from 1 to n."""
    top, bottom = sorted((top, bottom))
    assert kept_blocks(top / bottom, blocks) == max(1, -(-top * blocks // bottom))
    assert kept_blocks(1 - (bottom - top) / bottom or 1.0, blocks) == -(-top * blocks // bottom)


# -- properties ------------------------------------------------------------------------------------


@given(
    grid=st.tuples(*[st.integers(1, 6)] * 3),
    tile=st.tuples(*[st.integers(1, 4)] * 3),
    text=st.integers(0, 9),
    gate_is_tensor=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_ratio_1_without_coarse_branch_is_dense(grid, tile, text, gate_is_tensor):
    """top_k_ratio 1 and gate 0, a number or a tensor, is dense attention, text included."""
    q, k, v, _ = random_qkv((1, 2, math.prod(grid) + text, 8))
    gate = torch.zeros(()) if gate_is_tensor else 0
    out = video_sparse(q, k, v, grid, top_k_ratio=1.0, gate=gate, tile=tile)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v))


def test_heads_and_key_blocks_may_be_permuted():
    """Permuted heads permute the output; permuted key blocks leave it as it was."""
    q, k, v, _ = random_qkv((2, 4, 6 * 16, 8))
    sizes = torch.tensor([16, 9, 16, 4, 16, 12])
    out = video_sparse_attn(q, k, v, sizes, sizes, 3, 16)
    heads = [2, 0, 3, 1]
    permuted = video_sparse_attn(*(x[:, heads] for x in (q, k, v)), sizes, sizes, 3, 16)
    assert torch.equal(permuted, out[:, heads])
    blocks = [5, 3, 0, 1, 4, 2]
    moved = [x.unflatten(2, (6, 16))[:, :, blocks].flatten(2, 3) for x in (k, v)]
    torch.testing.assert_close(video_sparse_attn(q, *moved, sizes[blocks], sizes, 3, 16), out)


def test_autocast_leaves_the_scores_alone():
    """Under autocast the scores are still fp32, so the same tiles are chosen."""
    q, k, v, _ = random_qkv((1, 2, 8 * 8 * 8, 16))
    expected = video_sparse(q, k, v, (8, 8, 8), top_k=8, tile=(2, 2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = video_sparse(q, k, v, (8, 8, 8), top_k=8, tile=(2, 2, 2))
    assert torch.equal(got, expected)


def test_bitwise_repeatable():
    """Two runs, forward and backward, give the same bits."""
    q, k, v, grad = random_qkv((2, 3, 5 * 6 * 7, 16), dtype=torch.bfloat16)
    call = partial(video_sparse, grid=(5, 6, 7), top_k=4, tile=(2, 3, 3))
    first, second = (answer(call, q, k, v, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is None or torch.equal(a, b)
