"""A second judge that is not ours: torch's FlexAttention, with masks written from the definitions.

Each mask is a ``mask_mod``, a rule on token numbers. Our side gets it through BlockMask.from_flex,
so both FlexAttention's block lists and our reading of them are in the comparison; the way back,
through to_flex, is compared too.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from machine import HAS_GPU
from problems import require_backend
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from video_attn import BlockMask, attention

# Without a compiler it keeps the whole score matrix, as an oracle may.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BACKENDS = ["reference", "cpu"] if HAS_GPU else ["reference", "cpu", "triton"]


@dataclass
class Foreign:
    """A rule (batch, head, query, key) -> seen, over ``length`` tokens in blocks of ``block``."""

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    length: int
    block: int
    kv_length: int = 0
    batch: int = 1
    heads: int = 1  # that the rule tells apart

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the score matrix, with at least two heads, so that two share a key head."""
        return self.batch, max(2, self.heads), self.length, self.kv_length or self.length

    def flex_mask(self) -> Any:
        _, _, q_len, kv_len = self.shape
        return create_block_mask(
            self.rule, self.batch, self.heads, q_len, kv_len, device="cpu", BLOCK_SIZE=self.block
        )


def near_tiles(
    grid: tuple[int, int, int], tile: tuple[int, int, int], window: tuple[int, int, int]
):
    """Sliding tile attention over tokens in tile order, tiles whole: the rule of the paper."""
    volume = math.prod(tile)
    tiles = [n // size for n, size in zip(grid, tile, strict=True)]

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q_tile, kv_tile = i // volume, j // volume
        seen = q_tile >= 0
        for axis in range(3):
            after = math.prod(tiles[axis + 1 :])
            c, other = q_tile // after % tiles[axis], kv_tile // after % tiles[axis]
            low = (c - window[axis] // 2).clamp(0, tiles[axis] - window[axis])
            seen = seen & (other >= low) & (other < low + window[axis])
        return seen

    return rule


def chosen_tiles(volume: int, per_row: int):
    """Video sparse attention: every query tile of every head has its own set of key tiles."""

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (3 * (i // volume) + 5 * (j // volume) + h + 2 * b) % 7 < per_row

    return rule


FOREIGN = {
    "dense": Foreign(lambda b, h, i, j: i >= 0, 96, 32, kv_length=64),
    "sliding tiles": Foreign(near_tiles((6, 4, 4), (2, 2, 2), (2, 1, 2)), 96, 8),
    "sliding tiles, odd window": Foreign(near_tiles((1, 10, 12), (1, 2, 4), (1, 3, 1)), 120, 8),
    "chosen tiles": Foreign(chosen_tiles(16, 3), 112, 16, batch=2, heads=4),
    "padded tiles": Foreign(
        lambda b, h, i, j: (i % 16 < 12) & (j % 16 < 12) & ((i // 16 + j // 16) % 2 == 0), 96, 16
    ),
    "key padding": Foreign(lambda b, h, i, j: j < 70 - 40 * b, 96, 16, batch=2),
    "ragged end": Foreign(lambda b, h, i, j: (i // 16 - j // 16).abs() <= 1, 75, 16, kv_length=83),
    "some rows see nothing": Foreign(lambda b, h, i, j: (i // 16) % 3 < j // 16, 96, 16),
}


def inputs(problem: Foreign, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(13)
    batch, heads, q_len, kv_len = problem.shape
    shapes = [
        (batch, heads, q_len, 24), (batch, heads // 2, kv_len, 24),
        (batch, heads // 2, kv_len, 16), (batch, heads, q_len, 16),
    ]  # fmt: skip
    q, k, v, grad_out = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return [*(x.requires_grad_() for x in (q, k, v)), grad_out]


def answer(run: Callable[..., tuple[Tensor, Tensor]], problem: Foreign) -> oracle.Result:
    """Ours, in fp32."""
    q, k, v, grad_out = inputs(problem, torch.float32)
    out, lse = run(q, k, v)
    return oracle.Result(out, lse, *torch.autograd.grad(out, (q, k, v), grad_out))


def torch_answer(problem: Foreign, mask: Any) -> oracle.Result:
    """In fp64: out and lse of FlexAttention; gradients of torch's masked attention.

    FlexAttention has no backward pass on a CPU; scaled_dot_product_attention gets the same rule as
    a matrix.
    """
    q, k, v, grad_out = inputs(problem, torch.float64)
    plain = (x.detach() for x in (q, k, v))
    out, aux = flex_attention(
        *plain, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    dense = scaled_dot_product_attention(q, k, v, attn_mask=seen_by(problem), enable_gqa=True)
    torch.testing.assert_close(out, dense.detach())
    return oracle.Result(out, aux.lse, *torch.autograd.grad(dense, (q, k, v), grad_out))


def seen_by(problem: Foreign) -> Tensor:
    """The rule as bool [B, H, Sq, Sk]."""
    index = [torch.arange(n) for n in problem.shape]
    return problem.rule(*torch.meshgrid(*index, indexing="ij"))


@pytest.fixture(scope="module")
def torch_answers() -> dict[str, oracle.Result]:
    return {name: torch_answer(each, each.flex_mask()) for name, each in FOREIGN.items()}


def assert_equal(ours: oracle.Result, theirs: oracle.Result, sees: Tensor) -> None:
    """Up to fp32 rounding. FlexAttention promises no lse where a row sees nothing: ours is -inf."""
    for name, a, b in zip(oracle.Result._fields, ours, theirs, strict=True):
        if name == "lse":
            assert a[~sees].isneginf().all()
            a, b = a[sees], b[sees]
        torch.testing.assert_close(
            a.double(), b.double(), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FOREIGN)
def test_mask_from_flex(name, backend, torch_answers):
    """FlexAttention's own mask, read by from_flex, gives FlexAttention's own numbers."""
    require_backend(backend)
    problem = FOREIGN[name]
    mask = BlockMask.from_flex(problem.flex_mask())

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, mask, return_lse=True, backend=backend)

    assert_equal(answer(run, problem), torch_answers[name], seen_by(problem).any(-1))


@pytest.mark.parametrize("name", FOREIGN)
def test_mask_to_flex(name, torch_answers):
    """Our mask, given to FlexAttention, is the mask that it was."""
    problem = FOREIGN[name]
    ours = torch_answer(problem, BlockMask.from_flex(problem.flex_mask()).to_flex())
    sees = seen_by(problem).any(-1)
    torch.testing.assert_close(ours.out, torch_answers[name].out)
    torch.testing.assert_close(ours.lse[sees], torch_answers[name].lse[sees])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(64, 64), (40, 90), (90, 40)])
def test_causal(q_len, kv_len, backend):
    """Bottom-right aligned: a mask_mod says it in one line."""
    require_backend(backend)
    problem = Foreign(lambda b, h, i, j: j <= i + (kv_len - q_len), q_len, 16, kv_length=kv_len)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, is_causal=True, return_lse=True, backend=backend)

    theirs = torch_answer(problem, problem.flex_mask())
    assert_equal(answer(run, problem), theirs, seen_by(problem).any(-1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled FlexAttention needs g++ on a CPU")
@pytest.mark.parametrize("name", ["sliding tiles", "key padding"])
def test_compiled_flex_attention_agrees(name):
    """The fused kernel of FlexAttention, which really skips blocks (forward only on a CPU)."""
    problem = FOREIGN[name]
    q, k, v, _ = (x.detach() for x in inputs(problem, torch.float32))
    run = torch.compile(lambda *a, m: flex_attention(*a, block_mask=m, enable_gqa=True))
    mask = BlockMask.from_flex(problem.flex_mask())
    torch.testing.assert_close(
        run(q, k, v, m=problem.flex_mask()), attention(q, k, v, mask), rtol=2e-5, atol=2e-5
    )
