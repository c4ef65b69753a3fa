"""block_sparse_attn: attention by block maps and lists, by definition and beside FlexAttention."""

from __future__ import annotations

import random

import oracle
import pytest
import token_masks
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from video_cases import DEVICES, answer, random_qkv

from vsa import block_sparse_attn, block_sparse_attn_from_indices

pytestmark = pytest.mark.usefixtures("on_quick_backend")

MAPS = [
    pytest.param((2, 3, 5, 4, 64, 32), [32, 7, 32, 20], id="different_blocks_and_counts"),
    pytest.param((1, 2, 4, 4, 64, 64), [64, 16, 64, 48], id="blocks_of_64"),
    pytest.param((2, 2, 3, 5, 8, 8), [0, 8, 3, 0, 8], id="empty_blocks"),
    pytest.param((2, 2, 2, 3, 100, 100), None, id="blocks_of_100"),
]


def random_map(batch: int, heads: int, rows: int, columns: int, seed: int) -> Tensor:
    """A random block map with an empty row and a key block that nobody sees."""
    rng = random.Random(seed)
    keep = torch.tensor([rng.random() < 0.5 for _ in range(batch * heads * rows * columns)]).view(
        batch, heads, rows, columns
    )
    keep[:, :, 1] = False
    keep[:, :, :, 2] = False
    return keep


@pytest.mark.parametrize(("shape", "sizes"), MAPS)
@pytest.mark.parametrize("form", ["map", "indices"])
@pytest.mark.parametrize("device", DEVICES)
def test_block_sparse_attention_is_the_definition(shape, sizes, form, device):
    """block_sparse_attn and the list form: out, natural-log lse and gradients by the definition.

    Bug classes: rows without a block (0 and -inf, not NaN), a first block of size 0, half blocks in
    dQ, keys that nobody sees (zero gradients), lists in no order with -1 past their length.
    """
    batch, heads, nq, nk, q_size, kv_size = shape
    q, k, v, grad = random_qkv(
        (batch, heads, nq * q_size, 24), kv_len=nk * kv_size, device=device, seed=5
    )
    keep = random_map(batch, heads, nq, nk, seed=nq)
    lens = [kv_size] * nk if sizes is None else sizes
    tensor_sizes = None if sizes is None else torch.tensor(sizes, device=device)
    lists = [[[set(r.nonzero().flatten().tolist()) for r in h] for h in b] for b in keep]
    tokens = token_masks.listed_tokens(
        lists, (q_size, kv_size), (q.shape[2], k.shape[2]), None, [lens]
    )
    case = oracle.Case(q, k, v, tokens.to(device), grad_out=grad)

    def function(q, k, v):
        if form == "map":
            return block_sparse_attn(q, k, v, keep.to(device), tensor_sizes)
        counts, indices = (x.to(device) for x in shuffled_lists(keep))
        if tensor_sizes is None:
            return block_sparse_attn_from_indices(q, k, v, indices, counts, None)
        return block_sparse_attn_from_indices(q, k, v, indices, counts, tensor_sizes)

    unseen = ~tokens.any(-2).any(1)[:, None, :, None].to(device)
    poisoned = [x.masked_fill(unseen, torch.nan) for x in (k, v)]
    oracle.check_against_oracle(answer(function, q, *poisoned, grad), case)


def shuffled_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """(counts, lists in no order, -1 past their length)."""
    order = torch.rand(keep.shape, generator=torch.Generator().manual_seed(1))
    indices = order.masked_fill(~keep, 2).argsort(-1)
    counts = keep.sum(-1)
    return counts, indices.masked_fill(torch.arange(keep.shape[-1]) >= counts[..., None], -1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_sparse_attention_agrees_with_flex_attention():
    """A foreign oracle: FlexAttention with the mask that the function made."""
    q, k, v, _ = random_qkv((2, 3, 5 * 16, 16), kv_len=4 * 16)
    keep = random_map(2, 3, 5, 4, seed=2)
    sizes = torch.tensor([16, 5, 16, 9])

    def kept_and_valid(b, h, q_at, kv_at):
        return keep[b, h, q_at // 16, kv_at // 16] & (kv_at % 16 < sizes[kv_at // 16])

    def score_mod(score, b, h, q_at, kv_at):
        return torch.where(kept_and_valid(b, h, q_at, kv_at), score, -torch.inf)

    out, lse = block_sparse_attn(q, k, v, keep, sizes)
    expected = flex_attention(q, k, v, score_mod=score_mod)
    seen = keep.any(-1).repeat_interleave(16, -1)
    torch.testing.assert_close(out[seen], expected[seen])
    assert bool((out[~seen] == 0).all()) and bool(lse[~seen].isneginf().all())
