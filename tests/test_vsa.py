"""Video sparse attention: both branches, gate, block maps and lists against the definition.

Also a script: ``python tests/test_vsa.py`` prints what it checked, selection included.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial

import as_script
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from video_cases import DEVICES, DTYPES, random_qkv, spy_on_masks
from vsa_definition import NONE, TEXT, Tokens, check, tile_numbers

from video_attn import BlockMask, VideoLayout, video_sparse
from vsa import video_sparse_attn

pytestmark = pytest.mark.usefixtures("on_quick_backend")


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """The block masks that the functions attended with, in order."""
    return spy_on_masks(monkeypatch)


# -- padded blocks: the vsa functions --------------------------------------------------------------


@dataclass(frozen=True)
class Padded:
    """A problem of ``vsa.video_sparse_attn``: valid tokens of query and key blocks."""

    name: str
    block_size: int | tuple[int, int, int]
    kv_lens: list[int] | list[list[int]]
    top_k: int
    q_lens: list[int] | list[list[int]] | None = None
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    gate: str = "none"

    @property
    def volume(self) -> int:
        return math.prod(self.block_size) if isinstance(self.block_size, tuple) else self.block_size

    def tokens(self) -> Tokens:
        kv_lens = self._per_batch(self.kv_lens)
        q_lens = kv_lens if self.q_lens is None else self._per_batch(self.q_lens)
        q, kv = ([self._numbers(row) for row in lens] for lens in (q_lens, kv_lens))
        return Tokens(q, kv, len(q_lens[0]), len(kv_lens[0]))

    @staticmethod
    def _per_batch(lens) -> list[list[int]]:
        return lens if isinstance(lens[0], list) else [lens]

    def _numbers(self, lens: list[int]) -> list[int]:
        padding = [[NONE] * (self.volume - n) for n in lens]
        return [x for i, n in enumerate(lens) for x in [i] * n + padding[i]]


PADDED = [
    Padded("cube_64", (4, 4, 4), [64, 16, 64, 48, 32, 1], 3, heads=3, kv_heads=3),
    Padded("tokens_64", 64, [64, 64, 64, 64], 2, gate="elementwise"),
    Padded("volume_8", 8, [8, 8, 3, 8, 8, 1, 8], 3, gate="per_head"),
    Padded("volume_100", (4, 5, 5), [100, 80, 20, 7], 2, gate="elementwise"),
    Padded("volume_128", 128, [128, 77, 128], 2, gate="number"),
    Padded("volume_256", (4, 8, 8), [256, 200], 1, batch=1),
    Padded("volume_384", (6, 8, 8), [384, 30, 384], 2, batch=1, gate="zero"),
    Padded("head_dim_72", 16, [16, 9, 16, 5], 2, head_dim=72, gate="elementwise"),
    Padded("head_dim_96", 16, [16, 9, 16, 5], 2, head_dim=96),
    Padded("head_dim_128", 16, [16, 9, 16], 2, head_dim=128, batch=1),
    Padded("fewer_queries", 16, [16, 9, 16, 5, 16, 2], 4, q_lens=[7, 16], gate="elementwise"),
    Padded("fewer_keys", 16, [11, 16], 1, q_lens=[16, 16, 3, 16, 9]),
    Padded("sizes_per_batch", 16, [[16, 9, 0], [3, 16, 16]], 2, q_lens=[[16, 2], [0, 16]]),
    Padded("first_block_empty", 16, [0, 16, 9, 16], 2, q_lens=[16, 16], gate="elementwise"),
    Padded("more_kept_than_not_empty", 16, [0, 16, 0, 3], 3, q_lens=[16, 16]),
    Padded("all_kept", 16, [16, 9, 4], 3, gate="zero"),
    Padded("gqa", 16, [16, 9, 16, 5, 12], 2, heads=6, kv_heads=2, gate="elementwise"),
]


def make_gate(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(9)
    if kind == "elementwise":
        return torch.randn(shape, generator=generator).to(dtype).to(device)
    if kind == "per_head":
        return torch.randn(shape[1], 1, 1, generator=generator).to(dtype).to(device)
    return {"none": None, "number": 0.5, "zero": 0}[kind]


@pytest.mark.parametrize("problem", PADDED, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_padded_function_is_the_definition(problem, dtype, device, masks):
    """vsa.video_sparse_attn: out, dq, dk, dv, dgate by the definition, with NaN in all padding.

    Bug classes: batch > 1, q and kv of different block counts, non-zero padding in the means, NaN
    padding in P.V or in dQ of partial blocks, empty blocks (division by 0, -inf minus -inf),
    head_dim not a power of two, fp16 and fp32 inputs, volumes other than 64.
    """
    tokens, volume = problem.tokens(), problem.volume
    q_shape = (problem.batch, problem.heads, tokens.q_tiles * volume, problem.head_dim)
    *qkv, grad = random_qkv(
        q_shape, problem.kv_heads, tokens.kv_tiles * volume, dtype=dtype, device=device
    )
    gate = make_gate(problem.gate, grad.shape, dtype, device)
    sizes = torch.tensor(problem.kv_lens, dtype=torch.int32, device=device)
    q_sizes = None
    if problem.q_lens is not None:
        q_sizes = torch.tensor(problem.q_lens, device=device)

    def poison(name: str, x: Tensor) -> Tensor:
        if name == "gate" and problem.gate != "elementwise":
            return x
        own = torch.tensor(tokens.kv if name in "kv" else tokens.q, device=device)
        return x.masked_fill((own == NONE)[:, None, :, None], torch.nan)

    def function(q, k, v, gate):
        return video_sparse_attn(q, k, v, sizes, q_sizes, problem.top_k, problem.block_size, gate)

    got = check(function, qkv, gate, grad, tokens, problem.top_k, masks, poison)
    padding = torch.tensor(tokens.q, device=device) == NONE
    for x in got[:2]:
        assert (x.masked_fill(~padding[:, None, :, None], 0) == 0).all(), "padding must give 0"


class LargeResults(TorchDispatchMode):
    """Names of the operators that write a tensor as large as the output, in order."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        view = function.is_view or "view" in str(function) or "reshape" in str(function)
        if isinstance(result, Tensor) and result.numel() >= self.size and not view:
            self.names.append(str(function))
        return result


@pytest.mark.parametrize("kind", ["none", "number", "per_head", "elementwise", "zero"])
def test_full_tiles_cost_nothing_however_said(kind):
    """Without gradients: as many passes over the output with sizes as without, bitwise the same.

    A gate of every token takes one pass more: what it holds at padding may be NaN.
    """
    q, k, v, _ = random_qkv((2, 2, 6 * 64, 16))
    gate = make_gate(kind, q.shape, torch.float32, "cpu")
    passes, outs = [], []
    for sizes in (None, torch.full((6,), 64, dtype=torch.int32)):
        with torch.no_grad(), LargeResults(q.numel()) as seen:
            outs.append(video_sparse_attn(q, k, v, sizes, 2, 64, gate))
        passes.append(seen.names)
    assert torch.equal(*outs)
    assert len(passes[1]) == len(passes[0]) + (kind == "elementwise"), passes


@pytest.mark.parametrize("kind", ["none", "number", "per_head", "elementwise", "zero"])
def test_padding_is_zero_without_gradients_too(kind):
    """The pass that writes in place gives what the differentiable one gives."""
    q, k, v, _ = random_qkv((2, 2, 4 * 16, 8))
    sizes = torch.tensor([16, 3, 0, 9])
    padding = (torch.arange(16) >= sizes[:, None]).flatten()[:, None]
    q, k, v = (x.masked_fill(padding, torch.nan) for x in (q, k, v))
    gate = make_gate(kind, q.shape, torch.float32, "cpu")
    if kind == "elementwise":
        gate = gate.masked_fill(padding, torch.nan)
    out = video_sparse_attn(q, k, v, sizes, 2, 16, gate)
    expected = video_sparse_attn(q.clone().requires_grad_(), k, v, sizes, 2, 16, gate)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-6, atol=1e-6)
    assert (out.masked_fill(~padding, 0) == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_both_call_forms(device):
    """Both call forms in use, by position and by keyword, are told apart and agree."""
    q, k, v, _ = random_qkv((2, 2, 5 * 64, 16), device=device)
    sizes = torch.tensor([64, 3, 64, 50, 9], device=device)
    gate = torch.rand(q.shape, device=device)
    first = video_sparse_attn(q, k, v, sizes, 2, 64, gate)
    same = [
        video_sparse_attn(q, k, v, sizes, 2, (4, 4, 4), gate),
        video_sparse_attn(q, k, v, sizes, 2, compress_attn_weight=gate),
        video_sparse_attn(q, k, v, sizes, topk=2, block_size=64, compress_attn_weight=gate),
        video_sparse_attn(q, k, v, sizes, sizes, 2, 64, gate),
        video_sparse_attn(q, k, v, sizes, sizes, 2, compress_attn_weight=gate),
        video_sparse_attn(q, k, v, sizes, sizes, topk=2, compress_attn_weight=gate),
        video_sparse_attn(q, k, v, sizes, None, 2, [4, 4, 4], gate),
        video_sparse_attn(
            q, k, v, variable_block_sizes=sizes, q_variable_block_sizes=sizes.int(), topk=2,
            block_size=64, compress_attn_weight=gate,
        ),
    ]  # fmt: skip
    assert all(torch.equal(first, other) for other in same)
    ungated = video_sparse_attn(q, k, v, sizes, 2, 64)
    assert torch.equal(ungated, video_sparse_attn(q, k, v, sizes, sizes, 2, 64, None))
    assert not torch.equal(first, ungated)


def test_block_size_default_is_64_tokens():
    """The default block size, 64, is tokens per block, not a cube of 64 x 64 x 64 tokens."""
    q, k, v, _ = random_qkv((1, 1, 192, 8))
    assert video_sparse_attn(q, k, v, None, 2).shape == q.shape


# -- raster order ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """A problem of ``video_attn.video_sparse``; ``valid`` counts valid text tokens."""

    name: str
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    top_k: int
    text: int = 0
    valid: int | list[int] | None = None
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    gate: str = "none"
    layout: str = "bhsd"
    text_first: bool = False

    def tokens(self) -> Tokens:
        tiles = tile_numbers(self.grid, self.tile)
        valid = self.text if self.valid is None else self.valid
        rows = []
        for n in valid if isinstance(valid, list) else [valid]:
            text = [TEXT] * n + [NONE] * (self.text - n)
            rows.append(text + tiles if self.text_first else tiles + text)
        return Tokens(rows, rows, max(tiles) + 1, max(tiles) + 1)


VIDEOS = [
    Video("whole_tiles", (4, 4, 8), (2, 2, 4), 3),
    Video("whole_tiles_gate", (4, 4, 8), (2, 2, 4), 3, gate="elementwise"),
    Video("ragged", (5, 6, 7), (4, 4, 4), 3, gate="elementwise"),
    Video("ragged_bshd", (5, 6, 7), (2, 4, 4), 5, gate="elementwise", layout="bshd"),
    Video("per_head_gate", (3, 6, 7), (2, 4, 4), 2, gate="per_head"),
    Video("number_gate", (3, 6, 7), (2, 4, 4), 2, gate="number", heads=4),
    Video("text", (4, 4, 5), (2, 2, 4), 3, text=19, gate="elementwise"),
    Video("text_padding", (4, 4, 5), (2, 2, 4), 3, text=40, valid=7, layout="bshd"),
    Video("text_first", (4, 5, 5), (2, 2, 4), 4, 19, 5, text_first=True, gate="elementwise"),
    Video("text_per_batch", (4, 4, 5), (2, 2, 4), 3, text=21, valid=[0, 18], gate="per_head"),
    Video("no_gate_no_coarse", (4, 4, 5), (2, 2, 4), 3, text=3, gate="zero"),
    Video("gqa_v_dim", (4, 4, 6), (2, 2, 3), 3, heads=6, head_dim_v=40, gate="elementwise"),
    Video("one_tile", (2, 2, 2), (4, 4, 4), 1, text=2),
    Video("large_tile", (7, 9, 8), (6, 8, 8), 2, batch=1, gate="elementwise"),
]


@pytest.mark.parametrize("problem", VIDEOS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_raster_function_is_the_definition(problem, dtype, device, masks):
    """video_attn.video_sparse: the definition in raster order, text and gate; padding unread."""
    tokens = problem.tokens()
    *qkv, grad = random_qkv(
        (problem.batch, problem.heads, len(tokens.q[0]), problem.head_dim), problem.kv_heads,
        head_dim_v=problem.head_dim_v, dtype=dtype, device=device,
    )  # fmt: skip
    gate = make_gate(problem.gate, grad.shape, dtype, device)

    def turned(x):
        return x.transpose(1, 2) if problem.layout == "bshd" and isinstance(x, Tensor) else x

    def function(q, k, v, gate):
        if problem.gate == "per_head":
            gate = gate.view(-1, 1) if problem.layout == "bshd" else gate
        else:
            gate = turned(gate)
        return turned(
            video_sparse(
                turned(q), turned(k), turned(v), problem.grid, top_k=problem.top_k, gate=gate,
                tile=problem.tile, text_length=problem.valid, text_first=problem.text_first,
                layout=problem.layout,
            )
        )  # fmt: skip

    def poison(name: str, x: Tensor) -> Tensor:
        padding = torch.tensor(tokens.q, device=device) == NONE
        if name == "gate":  # what it holds at text gates nothing
            return x
        return x.masked_fill(padding[:, None, :, None], torch.nan)

    check(function, qkv, gate, grad, tokens, problem.top_k, masks, poison)


def test_ratio_counts_tiles_not_tokens(masks):
    """k comes from the number of tiles, partial ones included, not from tokens // volume."""
    q, k, v, _ = random_qkv((1, 1, 5 * 5 * 5, 8))  # 8 tiles of (4, 4, 4), though 125 // 64 is 1
    for ratio, kept in ((0.5, 4), (0.2, 2), (1.0, 8), (0.01, 1)):
        out, mask = video_sparse(q, k, v, (5, 5, 5), top_k_ratio=ratio, return_mask=True)
        assert out.shape == q.shape
        assert mask is masks[-1]
        assert bool((mask.kv_num_blocks == kept).all())


def test_gate_none_is_gate_one():
    """No gate adds the coarse branch as it is; the gate's forms broadcast like any tensor."""
    q, k, v, _ = random_qkv((2, 3, 4 * 4 * 4, 8))
    call = partial(video_sparse, q, k, v, (4, 4, 4), top_k=2, tile=(2, 2, 2))
    expected = call()
    ones = (1, 1.0, torch.ones(()), torch.ones(1, 3, 1, 1), torch.ones(2, 3, 64, 8), torch.ones(8))
    for gate in ones:
        torch.testing.assert_close(call(gate=gate), expected)
    difference = call(gate=0.5) - call(gate=0)
    torch.testing.assert_close(2 * difference, expected - call(gate=0))
    assert float(difference.abs().max()) > 0.01


def test_tile_order_and_raster_order_agree():
    """A model in padded tile order calls video_sparse_attn with the layout's block lengths."""
    video = VideoLayout((5, 6, 7), (4, 4, 4))
    q, k, v, _ = random_qkv((2, 3, video.sequence_length, 8))
    tiled = [video.to_tiles(x) for x in (q, k, v)]
    out = video_sparse_attn(*tiled, video.block_lens(), 3, video.tile)
    assert torch.equal(video.from_tiles(out), video_sparse(q, k, v, video.grid, top_k=3))


def test_large_activations_in_backward(masks):
    """Gradients hold at 16 times the usual activations, in bf16.

    Bug class: scaling keys in bf16 before the product gave dQ a relative error of 0.59.
    """
    tokens = Tokens([[i // 16 for i in range(96)]] * 1, [[i // 16 for i in range(96)]], 6, 6)
    *qkv, grad = random_qkv((1, 2, 96, 64), dtype=torch.bfloat16)
    qkv = [qkv[0] * 16, qkv[1] * 16, qkv[2]]
    check(
        lambda q, k, v, gate: video_sparse_attn(q, k, v, None, 2, 16, gate),
        qkv, None, grad, tokens, 2, masks,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(as_script.main(__file__, "test_block_sparse.py", "test_vsa_selection.py"))
