"""Masks of random problems: what the oracle sees, and the BlockMask that should say the same."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import token_masks
import torch
from torch import Tensor

from video_attn import BlockMask

if TYPE_CHECKING:
    from problems import Problem

VIDEO_KINDS = ("sliding", "selected")
Lists = list[list[list[set[int]]]]  # [B|1][H|1][Nq]: the key blocks that a query block sees
Masks = tuple[Tensor, BlockMask | None, Tensor, Tensor]


def problem_masks(problem: Problem, rng: random.Random) -> Masks:
    """Token mask; block mask or None; what may not be read, and what may.

    Those are the query rows past their block's valid length, bool [B|1, 1, Sq], and the valid keys
    of listed blocks, bool [B|1, H|1, Sk].
    """
    no_rows = torch.zeros(1, 1, problem.q_len, dtype=torch.bool)
    all_keys = torch.ones(1, 1, problem.kv_len, dtype=torch.bool)
    if problem.kind == "dense":
        return token_masks.dense_tokens(problem.q_len, problem.kv_len), None, no_rows, all_keys
    if problem.kind == "causal":
        return token_masks.causal_tokens(problem.q_len, problem.kv_len), None, no_rows, all_keys
    return _video_masks(problem, rng) if problem.kind in VIDEO_KINDS else _list_masks(problem, rng)


def _list_masks(problem: Problem, rng: random.Random) -> Masks:
    sizes, lengths = (problem.q_block_size, problem.kv_block_size), (problem.q_len, problem.kv_len)
    nq, nk = (-(-n // size) for n, size in zip(lengths, sizes, strict=True))
    listed_columns = [j for j in range(nk) if rng.random() > 0.15]  # the others: in no list at all

    def row() -> set[int]:
        if rng.random() < 0.12:
            return set()
        return {j for j in listed_columns if rng.random() < problem.density}

    mask_batch, mask_heads = _mask_shape(problem)
    lists = [[[row() for _ in range(nq)] for _ in range(mask_heads)] for _ in range(mask_batch)]
    q_lens = kv_lens = None
    if problem.lens != "none":
        batch = problem.batch if problem.lens == "per-batch" else 1
        q_lens, kv_lens = (
            [
                [rng.choice((0, size, size, rng.randint(0, size))) for _ in range(n)]
                for _ in range(batch)
            ]
            for n, size in ((nq, sizes[0]), (nk, sizes[1]))
        )
    token_mask = token_masks.listed_tokens(lists, sizes, lengths, q_lens, kv_lens)
    counts, indices = list_tensors(lists, nk, spare=rng.randrange(3))
    mask = BlockMask.from_indices(
        indices, *sizes, q_len=lengths[0], kv_len=lengths[1], kv_num_blocks=counts,
        q_block_lens=_int32(q_lens), kv_block_lens=_int32(kv_lens),
    )  # fmt: skip
    blind = torch.zeros(1, 1, problem.q_len, dtype=torch.bool)
    if q_lens is not None:
        everything = [[[{0} for _ in range(nq)]]]
        blind = ~token_masks.listed_tokens(everything, (sizes[0], 1), (lengths[0], 1), q_lens)[
            ..., 0
        ]
    listed = token_masks.listed_tokens(lists, sizes, lengths, None, kv_lens).any(-2)
    return token_mask, mask, blind, listed


def list_tensors(lists: Lists, num_kv_blocks: int, spare: int = 0) -> tuple[Tensor, Tensor]:
    """(counts int32 [B,H,Nq], indices int32 [B,H,Nq,K]); past its count, a block not to be seen."""
    width = max(1, max(len(row) for heads in lists for rows in heads for row in rows)) + spare

    def padded(row: set[int]) -> list[int]:
        wrong = next((j for j in range(num_kv_blocks) if j not in row), 0)
        return sorted(row) + [wrong] * (width - len(row))

    counts = [[[len(row) for row in rows] for rows in heads] for heads in lists]
    indices = [[[padded(row) for row in rows] for rows in heads] for heads in lists]
    return torch.tensor(counts, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32)


def _video_masks(problem: Problem, rng: random.Random) -> Masks:
    volume = math.prod(problem.tile)
    slots = token_masks.padded_coordinates(problem.grid, problem.tile)
    valid_text = rng.randint(0, problem.text_length)
    positions = [c is not None for c in slots] + [
        i < valid_text for i in range(problem.text_length)
    ]
    blocks = -(-len(positions) // volume)
    mask_batch, mask_heads = _mask_shape(problem)
    if problem.kind == "sliding":
        windows = [
            (rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 4)) for _ in range(mask_heads)
        ]
        token_mask = token_masks.sliding_tile_tokens(
            slots, problem.grid, problem.tile, windows, problem.text_length, valid_text
        )
    else:
        tiles = [i // volume if valid else -1 for i, valid in enumerate(positions)]
        selected = [
            [
                [set(rng.sample(range(blocks), rng.randint(0, blocks))) for _ in range(blocks)]
                for _ in range(mask_heads)
            ]
            for _ in range(mask_batch)
        ]
        token_mask = token_masks.selected_tile_tokens(tiles, tiles, selected)
    lens = [[sum(positions[i * volume : (i + 1) * volume]) for i in range(blocks)]]
    mask = BlockMask.from_dense(
        any_in_block(token_mask, volume, volume), volume, volume, _int32(lens), _int32(lens),
        q_len=problem.q_len, kv_len=problem.kv_len,
    )  # fmt: skip
    return token_mask, mask, ~torch.tensor(positions).view(1, 1, -1), token_mask.any(-2)


def any_in_block(token_mask: Tensor, q_block_size: int, kv_block_size: int) -> Tensor:
    """bool [B|1, H|1, Nq, Nk]: the blocks of a token mask that hold any pair."""
    q_len, kv_len = token_mask.shape[-2:]
    padded = torch.nn.functional.pad(
        token_mask, (0, -kv_len % kv_block_size, 0, -q_len % q_block_size)
    )
    return (
        padded.unflatten(-1, (-1, kv_block_size)).unflatten(-3, (-1, q_block_size)).any(-1).any(-2)
    )


def _mask_shape(problem: Problem) -> tuple[int, int]:
    heads = problem.kv_heads * problem.group
    return (problem.batch if problem.mask_batch else 1), (heads if problem.mask_heads else 1)


def _int32(rows: list[list[int]] | None) -> Tensor | None:
    return None if rows is None else torch.tensor(rows, dtype=torch.int32)
