"""Options of the vsa and st_attn functions: layouts, precision, backends, packed sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from st_attn import sliding_tile_attention
from video_attn import attention, radial, sliding_tile, video_sparse
from video_attn.functional.vsa import compress_and_select
from vsa import (
    block_sparse_attn,
    block_sparse_attn_from_indices,
    block_sparse_attn_varlen,
    video_sparse_attn,
)

V = 16  # tokens of a block


def qkv(tokens: int = 5 * V, heads: int = 2, batch: int = 1, dim: int = 8) -> list[Tensor]:
    make = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, heads, tokens, dim, generator=make) for _ in range(3)]


SIZES = torch.tensor([16, 3, 16, 9, 16])
KEEP = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.4


def by_layout(function, q, k, v, **options):
    """The result of both layouts, as [B, H, S, D]; they must be the same."""
    expected = function(q, k, v, **options)
    got = function(*(x.transpose(1, 2) for x in (q, k, v)), layout="bshd", **options)
    first = (lambda x: x[0]) if isinstance(expected, tuple) else (lambda x: x)
    assert torch.equal(first(got).transpose(1, 2), first(expected))
    return expected


@pytest.mark.parametrize("precision", ["native", "sage_fp16"])
def test_padded_functions_take_the_options_of_attention(precision):
    q, k, v = qkv()
    options = {"scale": 0.2, "precision": precision, "backend": "reference"}
    out = by_layout(
        lambda q, k, v, **o: video_sparse_attn(q, k, v, SIZES, 5, V, 0.0, **o), q, k, v, **options
    )
    all_blocks = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    exact, _ = by_layout(
        lambda q, k, v, **o: block_sparse_attn(q, k, v, all_blocks, SIZES, **o), q, k, v, **options
    )
    valid = (torch.arange(V) < SIZES[:, None]).flatten()
    limit = 1e-6 if precision == "native" else 2e-2  # padding of queries moves their scales
    assert (out - exact)[:, :, valid].abs().max() <= limit
    assert (out - attention(q, k, v, scale=0.2)).abs().max() > 1e-3, "sizes were ignored"


def test_a_gate_follows_the_layout():
    q, k, v = qkv()
    gate = torch.rand_like(v)
    expected = video_sparse_attn(q, k, v, SIZES, 2, V, gate)
    turned = [x.transpose(1, 2) for x in (q, k, v, gate)]
    got = video_sparse_attn(*turned[:3], SIZES, 2, V, turned[3], layout="bshd")
    assert torch.equal(got.transpose(1, 2), expected)


def test_block_maps_of_three_dimensions_serve_all_batch_items():
    q, k, v = qkv(batch=3)
    expected = block_sparse_attn(q, k, v, KEEP[None].expand(3, -1, -1, -1), SIZES)
    for got, wanted in zip(block_sparse_attn(q, k, v, KEEP, SIZES), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("heads", [1, 2])
def test_packed_sequences_are_each_on_their_own(heads):
    """Lists count from the first block of their sequence; nothing crosses from one to another."""
    blocks_q, blocks_k = [2, 0, 3, 1], [3, 1, 2, 2]
    make = torch.Generator().manual_seed(1)
    q = torch.randn(sum(blocks_q) * V, 2, 8, generator=make)
    k, v = (torch.randn(sum(blocks_k) * V, 2, 8, generator=make) for _ in range(2))
    sizes = torch.randint(0, V + 1, (sum(blocks_k),), generator=make)
    lists, counts = [], []
    for n, m in zip(blocks_q, blocks_k, strict=True):
        order = torch.rand(heads, n, m, generator=make).argsort(-1)
        lists.append(torch.nn.functional.pad(order, (0, 3 - m), value=99))
        counts.append(torch.randint(0, m + 1, (heads, n), generator=make))
    starts_q, starts_k = (torch.tensor([0, *n]).cumsum(0) * V for n in (blocks_q, blocks_k))
    out, lse = block_sparse_attn_varlen(
        q, k, v, torch.cat(lists, 1), torch.cat(counts, 1), starts_q, starts_k, V, sizes
    )
    for i, (idx, num) in enumerate(zip(lists, counts, strict=True)):
        rows, keys = slice(*starts_q[i : i + 2].tolist()), slice(*starts_k[i : i + 2].tolist())
        if rows.start == rows.stop:
            continue
        alone, alone_lse = block_sparse_attn_from_indices(
            q[None, rows], k[None, keys], v[None, keys], idx[None], num[None],
            sizes[keys.start // V : keys.stop // V], layout="bshd",
        )  # fmt: skip
        assert torch.equal(out[rows], alone[0]) and torch.equal(lse[:, rows], alone_lse[0])


def test_packed_sequences_refuse_what_does_not_fit():
    q = torch.randn(4 * V, 2, 8)
    starts = torch.tensor([0, 2 * V, 4 * V])
    idx, num = torch.zeros(1, 4, 1, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)
    for change, message in (
        ({"cu_seqlens_q": starts + 1}, "multiples of 16"),
        ({"cu_seqlens_k": starts[:2]}, "sequences"),
        ({"cu_seqlens_k": torch.tensor([0, 4 * V, 2 * V])}, "ascend"),
        ({"q2k_idx": idx + 2}, "q2k_idx must hold"),
        ({"q": q[: 3 * V]}, "q2k_idx must have a list for each of 3"),
    ):
        arguments = {
            "q": q, "k": q, "v": q, "q2k_idx": idx, "q2k_num": num, "cu_seqlens_q": starts,
            "cu_seqlens_k": starts, "block_size": V,
        } | change  # fmt: skip
        with pytest.raises(ValueError, match=message):
            block_sparse_attn_varlen(**arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda q, **o: sliding_tile(q, q, q, (5, 4, 4), (1, 1, 1), **o),
        lambda q, **o: sliding_tile_attention(q, q, q, (1, 1, 1), 0, False, (5, 4, 4), **o),
        lambda q, **o: radial(q, q, q, (5, 4, 4), **o),
        lambda q, **o: video_sparse(q, q, q, (5, 4, 4), top_k=1, **o),
        lambda q, **o: video_sparse_attn(q, q, q, None, 1, V, **o),
        lambda q, **o: block_sparse_attn(q, q, q, KEEP, None, **o),
    ],
)  # fmt: skip
def test_unknown_options_are_refused_by_name(call):
    q = qkv()[0]
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
        call(q, is_causal=True)
    with pytest.raises(ValueError, match="precision must be one of"):
        call(q, precision="int3")


def test_the_old_name_of_the_video_shape():
    q = qkv()[0]
    with pytest.warns(DeprecationWarning, match="seq_shape"):
        got = sliding_tile_attention(q, q, q, (1, 1, 1), 0, False, dit_seq_shape="5x4x4")
    assert torch.equal(got, sliding_tile_attention(q, q, q, (1, 1, 1), 0, False, "5x4x4"))
    by_layout(
        lambda q, k, v, **o: sliding_tile_attention(q, k, v, (1, 1, 1), 0, False, "5x4x4", **o),
        *qkv(),
    )


def test_numbers_of_numpy_are_numbers():
    q, k, v = qkv()
    grid = np.array([5, 4, 4])
    expected = video_sparse(q, k, v, (5, 4, 4), top_k=2, gate=0.5, scale=0.25)
    got = video_sparse(
        q, k, v, grid, top_k=np.int32(2), gate=np.float32(0.5), scale=np.float64(0.25)
    )
    assert torch.equal(got, expected)
    expected = sliding_tile(q, k, v, (4, 4, 4), (1, 2, 1), tile=(2, 2, 2), text_length=9)
    got = sliding_tile(
        q, k, v, tuple(np.int64([4, 4, 4])), np.int64([1, 2, 1]), tile=[np.int64(2)] * 3,
        text_length=np.int64(9),
    )  # fmt: skip
    assert torch.equal(got, expected)
    for bad in (np.bool_(True), True, np.float32(2.0)):
        with pytest.raises(TypeError, match="top_k must be an int"):
            video_sparse(q, k, v, grid, top_k=bad)


# -- selection as models were trained --------------------------------------------------------------


def ranked_as_trained(q: Tensor, k: Tensor, top_k: int) -> Tensor:
    """Means, products and scaling each rounded to bf16; ties to the lower index."""
    means = [x.unflatten(2, (-1, V)).mean(3).bfloat16().double() for x in (q, k)]
    products = (means[0] @ means[1].mT).bfloat16()
    scores = (products.float() * q.shape[3] ** -0.5).bfloat16().double()
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :top_k].sort(-1).values.int()


def test_scores_in_bf16_choose_as_models_were_trained():
    make = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, 96 * V, 64, generator=make).bfloat16().float() for _ in range(2))
    options = {"block_size": V, "top_k": 12, "scale": 64**-0.5, "gate": 0.0}
    ours, *_ = compress_and_select(q, k, k, None, None, **options)
    trained, *_ = compress_and_select(q, k, k, None, None, **options, score_dtype=torch.bfloat16)
    assert torch.equal(trained, ranked_as_trained(q, k, 12))
    assert (ours != trained).any(-1).float().mean() > 0.02, "rounding changes no choice here"


def test_score_dtype_of_the_functions():
    q, k, v = (x.bfloat16() for x in qkv(96 * V, 1))
    for dtype in (None, torch.bfloat16):
        mask = video_sparse(
            q, k, v, (96, 4, 4), tile=(1, 4, 4), top_k=9, score_dtype=dtype, return_mask=True
        )[1]
        expected = attention(q, k, v, mask)
        got = video_sparse_attn(q, k, v, None, 9, V, 0.0, score_dtype=dtype)
        assert torch.equal(got, expected)
    with pytest.raises(TypeError, match="score_dtype must be None, torch.bfloat16"):
        video_sparse(q, k, v, (96, 4, 4), top_k=9, score_dtype="bfloat16")
