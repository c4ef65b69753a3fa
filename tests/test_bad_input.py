"""Wrong input to the core: refused before any kernel runs, with the argument and what it held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_input import Refused, check_refused
from torch import Tensor

from video_attn import BlockMask, VideoLayout, attention, use_backend
from video_attn.device import device_info
from video_attn.quantize import QuantizationOptions
from video_attn.registry import Backend, register

KEEP = torch.ones(1, 1, 4, 4, dtype=torch.bool)
COUNTS = torch.full((1, 1, 4), 4, dtype=torch.int32)
INDICES = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4)
LENS = torch.full((1, 4), 16, dtype=torch.int32)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 4, 64, 32), dtype=dtype)


def attend(**changes: Any) -> Callable[[], Any]:
    """attention() on good arguments but for ``changes``; q, k, v are [2, 4, 64, 32]."""

    def call() -> Any:
        arguments: dict[str, Any] = {"q": x(), "k": x(), "v": x()} | changes
        return attention(**arguments)

    return call


def masked(**changes: Any) -> Callable[[], Any]:
    """attention() with a mask of ``changes`` that fits 64 tokens in blocks of 16 otherwise."""
    return lambda: attention(x(), x(), x(), make(**changes)())


def make(**changes: Any) -> Callable[[], Any]:
    """BlockMask() on good arguments but for ``changes``."""
    good: dict[str, Any] = {
        "kv_num_blocks": COUNTS, "kv_indices": INDICES, "q_block_size": 16, "kv_block_size": 16,
        "q_len": 64, "kv_len": 64,
    }  # fmt: skip
    return lambda: BlockMask(**(good | changes))


def mask_of(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: BlockMask.from_dense(*arguments, **options)


def layout(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: VideoLayout(*arguments, **options)


def strided() -> Tensor:
    return x(2, 4, 64, 64)[..., ::2]


GRID = VideoLayout((2, 4, 4), (2, 2, 2))
GOOD_MASK = make()()
V, T = ValueError, TypeError

ATTENTION = [
    Refused("q not a tensor", attend(q=[1.0]), T, "q", "list"),
    Refused("k not a tensor", attend(k=None), T, "k", "NoneType"),
    Refused("v with 3 dims", attend(v=x(4, 64, 32)), V, "v", "(4, 64, 32)"),
    Refused("q with 5 dims", attend(q=x(1, 2, 4, 64, 32)), V, "q", "(1, 2, 4, 64, 32)"),
    Refused("integer q", attend(q=x(dtype=torch.int32)), T, "q", "torch.int32"),
    Refused("complex q", attend(q=x(dtype=torch.complex64)), T, "q", "torch.complex64"),
    Refused("fp8 q", attend(q=x().to(torch.float8_e4m3fn)), T, "q", "torch.float8_e4m3fn"),
    Refused("k of another dtype", attend(k=x(dtype=torch.float16)), T, "k", "torch.float16"),
    Refused("v of another dtype", attend(v=x(dtype=torch.bfloat16)), T, "v", "torch.bfloat16"),
    Refused("k on another device", attend(k=x().to("meta")), V, "k", "meta"),
    Refused("v on another device", attend(v=x().to("meta")), V, "v", "meta"),
    Refused("k of another batch", attend(k=x(3, 4, 64, 32)), V, "k", "3"),
    Refused("v of batch 1", attend(v=x(1, 4, 64, 32)), V, "v", "1"),
    Refused("k of another head_dim", attend(k=x(2, 4, 64, 40)), V, "k", "40"),
    Refused("v of other heads", attend(v=x(2, 2, 64, 32)), V, "v", "2"),
    Refused("v of other tokens", attend(v=x(2, 4, 63, 32)), V, "v", "63"),
    Refused("head_dim 0", attend(q=x(2, 4, 64, 0), k=x(2, 4, 64, 0)), V, "q", "0"),
    Refused("head_dim 257", attend(q=x(2, 4, 64, 257), k=x(2, 4, 64, 257)), V, "q", "257"),
    Refused("head_dim of v 300", attend(v=x(2, 4, 64, 300)), V, "v", "300"),
    Refused("4 heads over 3", attend(k=x(2, 3, 64, 32), v=x(2, 3, 64, 32)), V, "q", "3"),
    Refused("2 heads over 4", attend(q=x(2, 2, 64, 32)), V, "q", "2"),
    Refused("no key heads", attend(k=x(2, 0, 64, 32), v=x(2, 0, 64, 32)), V, "q", "0"),
    Refused("q with last stride 2", attend(q=strided()), V, "q", "(16384, 4096, 64, 2)"),
    Refused("k transposed", attend(k=x(2, 4, 32, 64).mT), V, "k", "(8192, 2048, 1, 64)"),
    Refused("v with last stride 2", attend(v=strided()), V, "v", "(16384, 4096, 64, 2)"),
    Refused("scale 0", attend(scale=0.0), V, "scale", "0.0"),
    Refused("negative scale", attend(scale=-0.125), V, "scale", "-0.125"),
    Refused("scale NaN", attend(scale=float("nan")), V, "scale", "nan"),
    Refused("scale infinite", attend(scale=float("inf")), V, "scale", "inf"),
    Refused("scale a string", attend(scale="0.1"), T, "scale", "'0.1'"),
    Refused("scale a bool", attend(scale=True), T, "scale", "True"),
    Refused("scale a tensor", attend(scale=torch.tensor(0.1)), T, "scale", "tensor(0.1"),
    Refused("unknown precision", attend(precision="int4"), V, "precision", "'int4'"),
    Refused("precision None", attend(precision=None), V, "precision", "None"),
    Refused("unknown layout", attend(layout="sbhd"), V, "layout", "'sbhd'"),
    Refused("unknown backend", attend(backend="cudnn"), V, "backend", "'cudnn'"),
    Refused("backend a number", attend(backend=3), T, "backend", "3"),
    Refused("backend a list", attend(backend=["cpu"]), T, "backend", "['cpu']"),
    Refused("is_causal a number", attend(is_causal=1), T, "is_causal", "1"),
    Refused("return_lse a string", attend(return_lse="yes"), T, "return_lse", "'yes'"),
    Refused("deterministic None", attend(deterministic=None), T, "deterministic", "None"),
    Refused("unknown keyword", attend(dropout_p=0.1), T, "dropout_p", "dropout_p"),
    Refused("quantization a dict", attend(quantization={}), T, "quantization", "dict"),
    Refused("quantization with native", attend(quantization=QuantizationOptions()), V,
            "quantization", "native"),
    Refused("gradients of a quantized precision", attend(q=x().requires_grad_(),
            precision="sage_fp8"), V, "precision", "'sage_fp8'"),
]  # fmt: skip

ATTENTION_MASKS = [
    Refused("mask a tensor", attend(mask=KEEP), T, "mask", "Tensor"),
    Refused("mask and causal", attend(mask=GOOD_MASK, is_causal=True), V, "is_causal", "mask"),
    Refused("mask on another device", attend(mask=GOOD_MASK.to("meta")), V, "mask", "meta"),
    Refused("mask of other queries", attend(mask=GOOD_MASK, q=x(2, 4, 63, 32)), V, "mask", "64"),
    Refused("mask of other keys", attend(mask=GOOD_MASK, k=x(2, 4, 80, 32), v=x(2, 4, 80, 32)), V,
            "mask", "80"),
    Refused("mask of 3 batches", masked(kv_num_blocks=COUNTS.expand(3, 1, 4),
            kv_indices=INDICES.expand(3, 1, 4, 4)), V, "kv_num_blocks", "3"),
    Refused("mask of 3 heads", masked(kv_num_blocks=COUNTS.expand(1, 3, 4),
            kv_indices=INDICES.expand(1, 3, 4, 4)), V, "mask", "3 heads"),
    Refused("q lens of 3 batches", masked(q_block_lens=LENS.expand(3, 4)), V, "q_block_lens", "3"),
    Refused("kv lens of 3 batches", masked(kv_block_lens=LENS.expand(3, 4)), V, "kv_block_lens",
            "3"),
]  # fmt: skip

BLOCK_MASKS = [
    Refused("counts a list", make(kv_num_blocks=[4]), T, "kv_num_blocks", "list"),
    Refused("counts int64", make(kv_num_blocks=COUNTS.long()), T, "kv_num_blocks", "torch.int64"),
    Refused("counts 2-d", make(kv_num_blocks=COUNTS[0]), V, "kv_num_blocks", "(1, 4)"),
    Refused("lists int64", make(kv_indices=INDICES.long()), T, "kv_indices", "torch.int64"),
    Refused("lists 3-d", make(kv_indices=INDICES[0]), V, "kv_indices", "(1, 4, 4)"),
    Refused("lists of other rows", make(kv_indices=INDICES[:, :, :3]), V, "kv_indices",
            "(1, 1, 3, 4)"),
    Refused("lists on another device", make(kv_indices=INDICES.to("meta")), V, "kv_indices",
            "meta"),
    Refused("counts for other blocks", make(q_len=65), V, "kv_num_blocks", "65"),
    Refused("block size 0", make(q_block_size=0), V, "q_block_size", "0"),
    Refused("block size negative", make(kv_block_size=-16), V, "kv_block_size", "-16"),
    Refused("block size a float", make(kv_block_size=16.0), T, "kv_block_size", "16.0"),
    Refused("block size a bool", make(q_block_size=True), T, "q_block_size", "True"),
    Refused("no keys", make(kv_len=0), V, "kv_len", "0"),
    Refused("length a string", make(q_len="64"), T, "q_len", "'64'"),
    Refused("lens a list", make(q_block_lens=[16] * 4), T, "q_block_lens", "list"),
    Refused("lens int64", make(kv_block_lens=LENS.long()), T, "kv_block_lens", "torch.int64"),
    Refused("lens 1-d", make(kv_block_lens=LENS[0]), V, "kv_block_lens", "(4,)"),
    Refused("lens for other blocks", make(q_block_lens=LENS[:, :3]), V, "q_block_lens", "(1, 3)"),
    Refused("lens on another device", make(kv_block_lens=LENS.to("meta")), V, "kv_block_lens",
            "meta"),
    Refused("lens of two batches", make(q_block_lens=LENS.expand(2, 4),
            kv_block_lens=LENS.expand(3, 4)), V, "kv_block_lens", "3"),
    Refused("lens and lists of two batches", make(kv_num_blocks=COUNTS.expand(2, 1, 4),
            kv_indices=INDICES.expand(2, 1, 4, 4), q_block_lens=LENS.expand(3, 4)), V,
            "q_block_lens", "3"),
    Refused("keep not a tensor", mask_of([[True]], 16, 16), T, "keep", "list"),
    Refused("keep int", mask_of(KEEP.int(), 16, 16), T, "keep", "torch.int32"),
    Refused("keep 2-d", mask_of(KEEP[0, 0], 16, 16), V, "keep", "(4, 4)"),
    Refused("keep of other keys", mask_of(KEEP, 16, 16, kv_len=65), V, "kv_len", "65"),
    Refused("keep of other queries", mask_of(KEEP, 16, 16, q_len=81), V, "q_len", "81"),
    Refused("keep with key blocks of 0", mask_of(KEEP, 16, 0), V, "kv_block_size", "0"),
    Refused("keep with query blocks of 0", mask_of(KEEP, 0, 16), V, "q_block_size", "0"),
    Refused("keep with blocks of 1.5", mask_of(KEEP, 16, 1.5), T, "kv_block_size", "1.5"),
    Refused("keep with blocks of text", mask_of(KEEP, "16", 16), T, "q_block_size", "'16'"),
    Refused("keep without keys", mask_of(KEEP[..., :0], 16, 16), V, "keep", "(1, 1, 4, 0)"),
    Refused("list indices", lambda: BlockMask.from_indices([[0]], 16, 16, q_len=64, kv_len=64), T,
            "kv_indices", "list"),
    Refused("float indices", lambda: BlockMask.from_indices(INDICES.float(), 16, 16, q_len=64,
            kv_len=64), T, "kv_indices", "torch.float32"),
    Refused("indices 1-d", lambda: BlockMask.from_indices(INDICES[0, 0, 0], 16, 16, q_len=64,
            kv_len=64), V, "kv_indices", "(4,)"),
    Refused("flex a BlockMask of ours", lambda: BlockMask.from_flex(GOOD_MASK), T, "mask",
            "BlockMask"),
    Refused("refine by 3", lambda: GOOD_MASK.refine(3), V, "q_factor", "3"),
    Refused("refine keys by 5", lambda: GOOD_MASK.refine(2, 5), V, "kv_factor", "5"),
    Refused("refine by 0", lambda: GOOD_MASK.refine(0), V, "q_factor", "0"),
    Refused("refine by 2.0", lambda: GOOD_MASK.refine(2.0), T, "q_factor", "2.0"),
]  # fmt: skip

LAYOUTS = [
    Refused("grid of two", layout((4, 4), (2, 2, 2)), V, "grid", "(4, 4)"),
    Refused("grid of zero", layout((4, 0, 4), (2, 2, 2)), V, "grid", "(4, 0, 4)"),
    Refused("grid negative", layout((4, -1, 4), (2, 2, 2)), V, "grid", "(4, -1, 4)"),
    Refused("grid of floats", layout((4.0, 4, 4), (2, 2, 2)), V, "grid", "(4.0, 4, 4)"),
    Refused("grid in words", layout("4x4xfour", (2, 2, 2)), V, "grid", "'4x4xfour'"),
    Refused("grid a float", layout(4.5, (2, 2, 2)), T, "grid", "4.5"),
    Refused("grid a bool", layout(True, (2, 2, 2)), T, "grid", "True"),
    Refused("grid None", layout(None, (2, 2, 2)), T, "grid", "None"),
    Refused("tile of zero", layout((4, 4, 4), (2, 0, 2)), V, "tile", "(2, 0, 2)"),
    Refused("tile in words", layout((4, 4, 4), "2x2"), V, "tile", "'2x2'"),
    Refused("text negative", layout((4, 4, 4), (2, 2, 2), -1), V, "text_length", "-1"),
    Refused("text a float", layout((4, 4, 4), (2, 2, 2), 7.0), T, "text_length", "7.0"),
    Refused("text_first a number", layout((4, 4, 4), (2, 2, 2), 7, 1), T, "text_first", "1"),
    Refused("to_tiles of 31", lambda: GRID.to_tiles(x(1, 31, 8)), V, "x", "31"),
    Refused("from_tiles of 33", lambda: GRID.from_tiles(x(1, 33, 8)), V, "x", "33"),
    Refused("pad_tiles on dim 0", lambda: GRID.pad_tiles(x(5, 32, 8), dim=0), V, "x", "5"),
    Refused("unpad_tiles of a list", lambda: GRID.unpad_tiles([1.0]), T, "x", "list"),
    Refused("to_tiles on dim 3", lambda: GRID.to_tiles(x(1, 32, 8), dim=3), V, "dim", "3"),
]  # fmt: skip


def in_context(name: Any) -> Callable[[], Any]:
    def call() -> None:
        with use_backend(name):
            attention(x(), x(), x())

    return call


REFERENCE = Backend("reference", 0, lambda: None, lambda problem: None, lambda *a: None)

CHOICE = [
    Refused("use_backend unknown", in_context("gpu"), V, "backend", "'gpu'"),
    Refused("use_backend None", in_context(None), T, "backend", "None"),
    Refused("a backend twice", lambda: register(REFERENCE), V, "backend", "'reference'"),
    Refused("an unknown device", lambda: device_info("mps"), V, "device", "mps"),
]


@pytest.mark.parametrize(
    "row", [*ATTENTION, *ATTENTION_MASKS, *BLOCK_MASKS, *LAYOUTS, *CHOICE], ids=str
)
def test_refused(row: Refused):
    check_refused(row)


@pytest.mark.parametrize("value", ["nope", "CPU", "cpu,triton", " "])
def test_environment_variable(value, monkeypatch):
    """A typing mistake in the variable is an error, not the automatic choice."""
    monkeypatch.setenv("VIDEO_ATTN_BACKEND", value)
    check_refused(Refused("variable", attend(), V, "VIDEO_ATTN_BACKEND", repr(value)))


def test_the_good_arguments_of_this_table_are_good():
    """Otherwise every row could be refused for another reason than its own."""
    assert attend()().shape == (2, 4, 64, 32)
    assert masked()().shape == (2, 4, 64, 32)
    assert masked(q_block_lens=LENS, kv_block_lens=LENS.expand(2, 4))().shape == (2, 4, 64, 32)
    assert mask_of(KEEP, 16, 16)().q_len == 64
    assert GRID.to_tiles(x(1, 32, 8), dim=1).shape == (1, 32, 8)


def test_a_kernel_that_runs_is_noticed():
    with pytest.raises(AssertionError, match="a kernel ran"):
        check_refused(Refused("nothing wrong", attend(), V, "q", ""))


def test_mask_values_are_not_read():
    """Documented: lists may be on a GPU, so their values are the caller's promise."""
    finer = GOOD_MASK.to("meta").refine(2)
    assert finer.q_block_size * 2 == GOOD_MASK.q_block_size and finer.device.type == "meta"
