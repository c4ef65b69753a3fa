"""Host-side planning of the Hopper kernels (module ``video_attn._planning``), against brute force.

``row_plan`` runs the very functions by which the kernels turn a list of key blocks into steps
(csrc/hopper/step_list.h): refining blocks of 384 into halves of 64 and merging blocks of 64 into
steps of 128 are the same rule.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from video_attn import BlockMask, native

HALF, STEP, TILE = 64, 128, 128
SHARED_BYTES = 227 * 1024  # what one block of threads can have on sm_90


@pytest.fixture(scope="module")
def planning() -> Any:
    component = native.component("planning")
    if not component.record.get("built"):
        pytest.skip(str(component.reason))
    assert component.loaded, component.reason
    from video_attn import _planning

    return _planning


# -- from lists to steps ---------------------------------------------------------------------------


def keys_of(
    slots: list[int], block_size: int, length: int, lens: list[int] | None
) -> list[list[int]]:
    """The valid keys of each listed block, by definition."""
    found = []
    for slot in slots:
        valid = block_size if lens is None else min(lens[slot], block_size)
        end = min(slot * block_size + valid, length)
        found.append(list(range(slot * block_size, end)))
    return found


def check_row(planning, slots, block_size, length, lens) -> None:
    plan = planning.row_plan(slots, block_size=block_size, length=length, lens=lens)
    halves, blocks = plan["halves"], keys_of(slots, block_size, length, lens)
    # Every valid key once, and nothing else.
    attended = [token + i for token, valid in halves for i in range(valid)]
    assert sorted(attended) == sorted(itertools.chain(*blocks))
    # Each half lies in one block, starts on a multiple of 64 there, and has a key.
    for token, valid in halves:
        assert 1 <= valid <= HALF
        assert token % block_size % HALF == 0 and token // block_size in slots
    # Full halves come first, in list order, then the partial ones, in list order.
    full = [t for keys in blocks for t in keys[::HALF][: len(keys) // HALF]]
    partial = [keys[-(len(keys) % HALF)] for keys in blocks if len(keys) % HALF]
    assert [token for token, _ in halves] == full + partial
    assert [valid == HALF for _, valid in halves] == [True] * len(full) + [False] * len(partial)
    # Two halves are a step; those without a mask hold two full ones.
    assert plan["steps"] == -(-len(halves) // 2)
    assert plan["full_steps"] == len(full) // 2


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int, int, list[int] | None]:
    block_size = 64 * draw(st.sampled_from([1, 2, 3, 6]))
    length = draw(st.integers(1, 7 * block_size))
    blocks = -(-length // block_size)
    slots = sorted(draw(st.sets(st.integers(0, blocks - 1))))
    some = st.sampled_from([0, 1, 63, 64, 65, block_size]) | st.integers(0, block_size + 9)
    lens = draw(st.none() | st.lists(some, min_size=blocks, max_size=blocks))
    return slots, block_size, length, lens


@given(rows())
@example(([], 64, 64, None))  # an empty list
@example(([0], 384, 384, [0]))  # a list of nothing but padding
@example(([0, 1, 2], 64, 130, None))  # the end of the sequence
@example(([1], 128, 256, [128, 300]))  # more than a block holds
def test_steps_of_a_row(planning, row):
    check_row(planning, *row)


def test_long_rows(planning):
    rng = random.Random(5)
    for block_size in (64, 128, 384):
        blocks = 900
        lens = [
            rng.choice((block_size, block_size, 0, rng.randint(0, block_size)))
            for _ in range(blocks)
        ]
        slots = sorted(rng.sample(range(blocks), 500))
        check_row(planning, slots, block_size, blocks * block_size - 17, lens)
        check_row(planning, slots, block_size, blocks * block_size, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [4]}, "blocks must lie in 0 to 3, got 4"),
        ({"blocks": [-1]}, "blocks must lie in 0 to 3, got -1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"lens": [1, 2]}, "lens must have 4 entries, has 2"),
    ],
)
def test_bad_rows(planning, changes, message):
    good: dict[str, Any] = {"blocks": [0, 3], "block_size": 64, "length": 250, "lens": None}
    arguments = {**good, **changes}
    with pytest.raises(ValueError, match=message):
        planning.row_plan(arguments.pop("blocks"), **arguments)


# -- two rows that share loads ---------------------------------------------------------------------


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[int], list[int], int, list[int] | None]:
    blocks = draw(st.integers(1, 40))
    lists = st.sets(st.integers(0, blocks - 1)).map(sorted)
    lens = st.lists(st.sampled_from([64, 64, 64, 63, 0, 80]), min_size=blocks, max_size=blocks)
    length = 64 * blocks - draw(st.sampled_from([0, 0, 1, 63]))
    return draw(lists), draw(lists), length, draw(st.none() | lens)


@given(pairs())
@example(([], [], 64, None))
@example(([0, 1, 2], [0, 1, 2], 192, None))
def test_what_two_rows_both_see_is_loaded_once(planning, pair):
    first, second, length, lens = pair
    plan = planning.pair_plan(first, second, length=length, lens=lens)
    whole = [
        slot
        for slot in sorted(set(first) & set(second))
        if (slot + 1) * 64 <= length and (lens is None or lens[slot] >= 64)
    ]
    assert plan["shared_steps"] == len(whole) // 2
    halves = []
    for given_list, row in zip((first, second), plan["rows"], strict=True):
        assert sorted(row) == given_list
        assert row[: len(whole)] == whole
        assert row[len(whole) :] == sorted(set(given_list) - set(whole), reverse=True)
        halves.append(planning.row_plan(row, block_size=64, length=length, lens=lens)["halves"])
    shared = 2 * plan["shared_steps"]
    assert halves[0][:shared] == halves[1][:shared] == [(64 * slot, 64) for slot in whole[:shared]]


# -- transposes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_transposed_lists(planning, seed):
    """The backward pass walks over the pairs of the forward pass: each once, by the transpose."""
    rng = random.Random(seed)
    size = rng.choice((64, 128, 384))
    q_len, kv_len = rng.randint(1, 5 * size), rng.randint(1, 5 * size)
    q_blocks, kv_blocks = -(-q_len // size), -(-kv_len // size)
    keep = torch.tensor([[rng.random() < 0.5 for _ in range(kv_blocks)] for _ in range(q_blocks)])
    q_lens, kv_lens = ([rng.randint(0, size) for _ in range(n)] for n in (q_blocks, kv_blocks))
    mask = BlockMask.from_dense(
        keep[None, None], size, size,
        torch.tensor([q_lens], dtype=torch.int32), torch.tensor([kv_lens], dtype=torch.int32),
        q_len=q_len, kv_len=kv_len,
    )  # fmt: skip
    seen = torch.zeros(2, q_len, kv_len, dtype=torch.bool)
    sides = ((q_lens, q_len, kv_lens, kv_len), (kv_lens, kv_len, q_lens, q_len))
    lists = ((mask.kv_num_blocks, mask.kv_indices), mask.transposed())
    for way, ((counts, indices), (own_lens, own_len, lens, length)) in enumerate(
        zip(lists, sides, strict=True)
    ):
        for row in range(counts.shape[2]):
            slots = indices[0, 0, row, : counts[0, 0, row]].tolist()
            plan = planning.row_plan(slots, block_size=size, length=length, lens=lens)
            for token, valid in plan["halves"]:
                start, end = row * size, min(row * size + own_lens[row], own_len)
                pairs = seen[0] if way == 0 else seen[1].T
                assert not pairs[start:end, token : token + valid].any(), "a pair twice"
                pairs[start:end, token : token + valid] = True
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], mask.to_token_mask()[0, 0])


# -- tiles, memory, grid ---------------------------------------------------------------------------

FORWARD = {"batch": 1, "heads": 24, "length": 115200, "block_size": 384, "head_dim": 128}


@pytest.mark.parametrize("grain", ["coarse", "fine"])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128])
def test_shared_memory_of_a_forward_launch(planning, grain, head_dim):
    plan = planning.forward_plan(grain, multiprocessors=132, **{**FORWARD, "head_dim": head_dim})
    assert plan["channels"] == (64 if head_dim <= 64 else 128)
    assert plan["tile_tokens"] == TILE and plan["step_tokens"] == STEP
    # Two warpgroups of consumers with 64 rows each, one of producers.
    assert plan["threads"] == 128 * (TILE // 64 + 1)
    slot = STEP * plan["channels"] * 2
    queries = TILE * plan["channels"] * 2
    assert queries + plan["stages"] * slot < plan["shared_bytes"] <= SHARED_BYTES
    # A consumer holds the keys of one step and the values of the one before; coarse ones hold the
    # same. At least one more operand is on its way.
    assert plan["stages"] > {"coarse": 2, "fine": 4}[grain]


def tiles_by_definition(grain: str, length: int, block_size: int) -> int:
    """Pieces of at most 128 rows; a coarse one never spans two blocks, with their two lists."""
    blocks = [min(block_size, length - start) for start in range(0, length, block_size)]
    if grain == "fine":
        return -(-length // TILE)
    # The last block has all its tiles, also those past the end of the sequence.
    return len(blocks) * -(-block_size // TILE)


@pytest.mark.parametrize("grain", ["coarse", "fine"])
def test_grid_of_a_forward_launch(planning, grain):
    rng = random.Random(7)
    for _ in range(200):
        block_size = 64 if grain == "fine" else 64 * rng.randint(2, 9)
        batch, heads, sms = rng.randint(1, 3), rng.randint(1, 30), rng.choice((78, 114, 132))
        length = rng.randint(1, 5000)
        plan = planning.forward_plan(
            grain, batch=batch, heads=heads, length=length, block_size=block_size, head_dim=64,
            multiprocessors=sms,
        )  # fmt: skip
        assert plan["tiles"] == batch * heads * tiles_by_definition(grain, length, block_size)
        assert plan["blocks"] == min(plan["tiles"], sms)


def test_long_dense_launches_draw_their_tiles(planning):
    """A block of threads that starts late does less; short launches want no ticket."""
    dense = {"batch": 1, "heads": 24, "block_size": 128, "head_dim": 128, "multiprocessors": 132}
    plans = [planning.forward_plan("coarse", length=n, **dense) for n in (4096, 32768)]
    # 24 heads of 32 tiles, 32 steps each, by 132: 186 steps a block; 64 times as many.
    assert [plan["draws_dense_tiles"] for plan in plans] == [False, True]
    # No more tiles than blocks of threads: each has one, however long.
    one = {**dense, "heads": 1, "length": 16896}
    assert not planning.forward_plan("coarse", **one)["draws_dense_tiles"]


def test_many_tiles_are_counted_in_64_bits(planning):
    big = {**FORWARD, "batch": 4096, "heads": 4096, "length": 2**20, "block_size": 128}
    assert planning.forward_plan("coarse", multiprocessors=132, **big)["tiles"] == 2**24 * 2**13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grain": "medium"}, "grain must be 'coarse' or 'fine', got 'medium'"),
        ({"head_dim": 136}, "head_dim must be at most 128"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"heads": -3}, "heads must be at least 1, got -3"),
    ],
)
def test_bad_forward_plans(planning, changes, message):
    arguments = {"grain": "coarse", "multiprocessors": 132, **FORWARD, **changes}
    with pytest.raises(ValueError, match=message):
        planning.forward_plan(arguments.pop("grain"), **arguments)
