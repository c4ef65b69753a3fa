"""The judge is judged: the oracle against torch's attention, the rule against wrong answers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import oracle
import pytest
import token_masks
import torch
from poison import fill_with_poison
from problems import HEAD_DIMS, MEMORIES, Built, Problem, random_problems, run_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from video_attn.calls import empty_like_heads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wide_problem(dtype: torch.dtype = torch.float32, **changes: object) -> Built:
    """Many keys, so that one block is a small part of every output: the hardest mistake to see."""
    problem = Problem(
        index=0, seed=7, kind="lists", dtype=dtype, batch=2, kv_heads=1, group=2, head_dim=32,
        head_dim_v=32, memory="bhsd", logits="normal", with_lse_grad=True, q_len=128, kv_len=512,
        q_block_size=64, kv_block_size=16, mask_heads=True, density=0.9,
    )  # fmt: skip
    return replace(problem, **changes).build()


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("answer", [oracle.attention_oracle, oracle.attention_plain])
def test_oracle_equals_torch(answer, causal):
    """Square, because torch aligns causal masks at the top left."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 65, 24, dtype=torch.float64) for h in (4, 2, 2))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = token_masks.causal_tokens(65, 65) if causal else token_masks.dense_tokens(65, 65)
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True, scale=0.3)
    out, lse = answer(q, k, v, mask, 0.3)
    torch.testing.assert_close(out, expected)
    scores = (0.3 * q @ k.repeat_interleave(2, 1).mT).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    g, g_lse = torch.randn_like(out), torch.randn_like(lse)
    wanted = torch.autograd.grad((expected, scores.logsumexp(-1)), (q, k, v), (g, g_lse))
    torch.testing.assert_close(torch.autograd.grad((out, lse), (q, k, v), (g, g_lse)), wanted)


def test_causal_is_aligned_at_the_bottom_right():
    assert token_masks.causal_tokens(2, 3)[0, 0].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert token_masks.causal_tokens(3, 2)[0, 0].tolist() == [[0, 0], [1, 0], [1, 1]]


def test_sliding_tile_window_by_hand():
    """5 tiles of 2 on one axis, window 3: the window is shifted at the border, never shrunk."""
    coordinates = token_masks.raster_coordinates((10, 1, 1))
    tokens = token_masks.sliding_tile_tokens(coordinates, (10, 1, 1), (2, 1, 1), [(3, 1, 1)], 2, 1)
    seen = [[j for j in range(12) if row[j]] for row in tokens[0, 0]]
    low = {0: 0, 1: 0, 2: 2, 3: 4, 4: 4}
    for i in range(10):
        assert seen[i] == [*range(low[i // 2], low[i // 2] + 6), 10]
    assert seen[10] == list(range(11)), "valid text sees all that is valid"
    assert seen[11] == [], "padded text sees nothing"


def test_tile_order_by_hand():
    order = token_masks.tile_order_coordinates((1, 2, 3), (1, 2, 2))
    assert order == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 2), (0, 1, 2)]
    assert token_masks.padded_coordinates((1, 2, 3), (1, 2, 2)) == [*order, None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rule_accepts_plain_torch_and_other_order_of_summation(dtype):
    built = wide_problem(dtype)
    oracle.check_against_oracle(oracle.answer(oracle.attention_plain, built), built)

    def keys_from_the_back(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor, scale: float):
        return oracle.attention_plain(q, k.flip(2), v.flip(2), token_mask.flip(-1), scale)

    oracle.check_against_oracle(oracle.answer(keys_from_the_back, built), built)


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def wrong_sign(x: Tensor) -> Tensor:
    return -x


def swapped_heads(x: Tensor) -> Tensor:
    """Two heads exchanged; of one key head, its two halves of the head dim."""
    return x.roll(1, 1) if x.shape[1] > 1 else x.roll(x.shape[-1] // 2, -1)


def swapped_batches(x: Tensor) -> Tensor:
    return x.flip(0)


def one_row_of_its_neighbour(x: Tensor) -> Tensor:
    """The row is the largest one: a row that sees nothing may well equal its neighbour."""
    x = x.clone()
    first_head = x[0, 0].nan_to_num(neginf=0.0).view(x.shape[2], -1)
    row = int(first_head.abs().amax(-1).argmax())
    x[0, 0, row] = x[0, 0, row - 1]
    return x


def one_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, -1, 3] = torch.nan
    return x


def one_percent_too_large(x: Tensor) -> Tensor:
    return x * 1.01


MISTAKES = (zeros, wrong_sign, swapped_heads, swapped_batches, one_row_of_its_neighbour, one_nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", oracle.Result._fields)
def test_rule_refuses_mistakes_in_one_tensor(part, dtype):
    built = wide_problem(dtype)
    expected, right = oracle.expected_answers(built), run_attention(built, "reference")
    oracle.check_against_oracle(right, built, expected=expected)
    mistakes = MISTAKES + (one_percent_too_large,) * (dtype != torch.bfloat16)
    for mistake in mistakes:
        wrong = right._replace(**{part: mistake(getattr(right, part))})
        with pytest.raises(AssertionError, match=part):
            oracle.check_against_oracle(wrong, built, mistake.__name__, expected)


def wrong_token_masks(built: Built) -> dict[str, Tensor]:
    """Token masks that differ from the right one in a single place."""
    right = built.token_mask
    seen, unseen = (
        next(
            (i, j)
            for i, j in itertools.product(range(2), range(32))
            if bool(right[0, 0, i * 64, j * 16]) == wanted and right[0, 0, i * 64].any()
        )
        for wanted in (True, False)
    )
    masks = {}
    for name, (i, j), value in (("one block less", seen, False), ("one block more", unseen, True)):
        masks[name] = right.clone()
        masks[name][0, 0, i * 64 : (i + 1) * 64, j * 16 : (j + 1) * 16] = value
    masks["heads exchanged"] = right.roll(1, 1)
    masks["no mask"] = torch.ones_like(right)
    return masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rule_refuses_answers_to_another_mask(dtype):
    """One key block of 32 too few or too many in one row of one head, seen in every tensor."""
    built = wide_problem(dtype)
    expected = oracle.expected_answers(built)
    for name, token_mask in wrong_token_masks(built).items():
        other = oracle.Case(
            built.q, built.k, built.v, token_mask, built.scale, built.grad_out, built.grad_lse
        )
        wrong = oracle.answer(oracle.attention_oracle, other, torch.float64)
        right = expected[1][0]
        for part, theirs, ours in zip(oracle.Result._fields, wrong, right, strict=True):
            with pytest.raises(AssertionError, match=part):
                mixed = right._replace(**{part: theirs.to(ours.dtype)})
                oracle.check_against_oracle(mixed, built, name, expected)


@pytest.mark.parametrize("part", ["dq", "dk", "dv"])
def test_rule_refuses_gradients_of_another_loss(part):
    """The gradient without lse's share, and a scale forgotten."""
    built = wide_problem()
    right = oracle.answer(oracle.attention_plain, built)
    without_lse = oracle.answer(oracle.attention_plain, replace(built, grad_lse=None))
    half_scale = right._replace(**{part: getattr(right, part) / 2})
    wrong_answers = [half_scale] if part == "dv" else [half_scale, without_lse]
    for wrong in wrong_answers:
        with pytest.raises(AssertionError, match=part):
            oracle.check_against_oracle(
                right._replace(**{part: getattr(wrong, part)}), built, "another loss"
            )


def test_rule_refuses_wrong_shape_dtype_and_noise_where_nothing_is_seen():
    built = wide_problem()
    right = oracle.answer(oracle.attention_plain, built)
    with pytest.raises(AssertionError, match=r"out: shape \(2, 2, 128, 31\)"):
        oracle.check_against_oracle(right._replace(out=right.out[..., 1:]), built)
    with pytest.raises(AssertionError, match="dq: dtype torch.float64"):
        oracle.check_against_oracle(right._replace(dq=right.dq.double()), built)
    unseen = ~built.token_mask.any(-2).unflatten(1, (1, 2)).any(2).expand(2, 1, -1)
    assert unseen.any(), "the problem must have keys that nobody sees"
    noisy = right.dk.masked_fill(unseen[..., None], 1e-30)
    with pytest.raises(AssertionError, match="keys that no query sees"):
        oracle.check_against_oracle(right._replace(dk=noisy), built)
    blind = ~built.token_mask.any(-1).expand(2, 2, -1)
    assert blind.any(), "the problem must have queries that see nothing"
    with pytest.raises(AssertionError, match="queries that see no key"):
        finite = right.lse.masked_fill(blind, -1e30)
        oracle.check_against_oracle(right._replace(lse=finite), built)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float8_e4m3fn], ids=str)
def test_allocations_of_the_package_are_poisoned(dtype):
    """And only those: a test's own torch.empty is its own affair."""
    got = empty_like_heads(torch.ones(1, 2, 3, 4), 5, dtype)
    assert got.shape == (1, 2, 3, 5) and got.float().isnan().all()
    garbage = fill_with_poison(torch.empty(3, dtype=torch.int32))
    assert (garbage > 2**29).all()


def test_generator_is_reproducible_and_covers_every_property():
    lists = [random_problems(300, seed=3, dtypes=DTYPES) for _ in range(2)]
    assert lists[0] == lists[1] != random_problems(300, seed=4, dtypes=DTYPES)
    first, second = (lists[0][17].build() for _ in range(2))
    assert torch.equal(first.q, second.q) and torch.equal(first.token_mask, second.token_mask)
    assert len({str(p) for p in lists[0]}) == 300
    for name, expected in (
        ("memory", set(MEMORIES)),
        ("dtype", set(DTYPES)),
        ("kind", {"lists", "sliding", "selected", "dense", "causal"}),
        ("group", {1, 2, 4}),
        ("batch", {1, 2, 3}),
        ("lens", {"none", "shared", "per-batch"}),
        ("logits", {"normal", "peaked", "shifted"}),
    ):
        assert {getattr(p, name) for p in lists[0]} == expected, name
    assert {(p.head_dim, p.head_dim_v) for p in lists[0]} >= set(HEAD_DIMS)
    assert {8, 16, 64, 100, 128, 384} <= {p.q_block_size for p in lists[0]}
    assert any(p.q_block_size != p.kv_block_size for p in lists[0])
    assert any(p.q_len % 2 and p.kv_len % 2 for p in lists[0])


def test_generated_problems_hold_what_they_promise():
    """Empty rows, empty blocks, unlisted keys, poison and strides really occur in the tensors."""
    built = [p.build() for p in random_problems(60, seed=3, dtypes=DTYPES)]
    sparse = [b for b in built if b.mask is not None]
    assert any((b.mask.kv_num_blocks == 0).any() for b in sparse), "empty rows"
    assert any(b.mask.kv_block_lens is not None and (b.mask.kv_lens() == 0).any() for b in sparse)
    assert any(b.mask.kv_num_blocks.shape[0] > 1 for b in sparse), "lists per batch"
    assert any(b.kernel_inputs[0].isnan().any() for b in sparse), "poisoned queries"
    assert any(b.kernel_inputs[1].isnan().any() for b in sparse), "poisoned keys"
    assert any(b.kernel_inputs[1].stride(1) == 0 for b in built), "one key head for all"
    assert any(b.kernel_inputs[0].storage_offset() % 8 for b in built), "unaligned starts"
    assert any(not b.kernel_inputs[0].is_contiguous() for b in built)
    for b in built:
        assert all(x.isfinite().all() for x in (b.q, b.k, b.v, b.grad_out)), str(b.problem)
        assert all(x.stride(-1) == 1 for x in b.kernel_inputs), str(b.problem)
