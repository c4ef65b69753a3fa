"""Quantizers and attention that read and write raster order, by host emulation: not a bit differs
from moving the tokens to tile order and back."""

from __future__ import annotations

import math

import pytest
import sage_emulation
import torch
from sage_problems import forward_call, qkv
from torch import Tensor

from video_attn import VideoLayout, registry, sliding_tile, use_backend
from video_attn.backends import cuda_sage
from video_attn.patterns.sliding_tile import sliding_tile_mask
from video_attn.quantize import QUANTIZED_PRECISIONS, QuantizationOptions
from video_attn.registry import Backend, backends, forget_choices

pytestmark = pytest.mark.skipif(
    sage_emulation.missing() is not None, reason=f"host emulation: {sage_emulation.missing()}"
)

# Whole tiles; partial ones on every axis; text after the video, and before it.
LAYOUTS = {
    "whole": VideoLayout((4, 8, 8), (2, 4, 8)),
    "ragged": VideoLayout((3, 5, 9), (2, 4, 8)),
    "text": VideoLayout((2, 7, 8), (2, 4, 8), 70),
    "text-first": VideoLayout((2, 7, 8), (2, 4, 8), 20, True),
}


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch):
    """cuda_sage serves CPU tensors, by its emulation, as it serves those of a GPU."""
    served = next(row for row in backends() if row.name == "cuda_sage")
    row = Backend(
        "cuda_sage", 100, lambda: None, lambda problem: None, served.forward,
        forward_in_order=served.forward_in_order,
    )  # fmt: skip
    monkeypatch.setitem(registry._backends, "cuda_sage", row)
    forget_choices()
    with sage_emulation.options(capability=90):
        yield
    monkeypatch.undo()
    forget_choices()


def _raster(layout: VideoLayout, memory: str, dims: tuple[int, int], dtype: torch.dtype):
    """q, k, v in raster order, [B, H, S, D], as parts of a fused tensor whose rest is NaN."""
    tensors = qkv((layout.sequence_length,) * 2, (2, 1), dims, 2, dtype)
    if memory == "bhsd":
        return tensors
    views = []
    for x in tensors:
        wide = torch.full((*x.transpose(1, 2).shape[:3], x.shape[3] + 8), math.nan, dtype=dtype)
        views.append(wide[..., : x.shape[3]].transpose(1, 2).copy_(x))
    return views


@pytest.mark.parametrize(
    ("name", "memory", "dims", "dtype", "capability"),
    [
        ("whole", "bhsd", (64, 64), torch.bfloat16, 89),
        ("ragged", "bshd", (128, 40), torch.float16, 90),
        ("text", "bshd", (64, 64), torch.float32, 90),
        ("text-first", "bhsd", (40, 33), torch.float16, 89),
    ],
)
@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_codes_and_outputs_are_those_of_moved_tensors(
    precision, name, memory, dims, dtype, capability
):
    layout = LAYOUTS[name]
    q, k, v = _raster(layout, memory, dims, dtype)
    valid = torch.tensor([layout.text_length // 3, layout.text_length])
    mask = sliding_tile_mask(
        layout, ((1, 1, 2),), text_length=valid if layout.text_length else None
    )
    options = QuantizationOptions(granularity="per_thread", smooth_v=True, smooth_q=True)
    rest = {"precision": precision, "options": options}
    places = layout.tile_places()
    moved = forward_call(*(layout.to_tiles(x) for x in (q, k, v)), mask, **rest)
    in_place = forward_call(q, k, v, mask, **rest)
    start = 0 if layout.text_first else layout.video_length
    for x in (q, k, v):  # text past the valid tokens, which nobody may read
        x[0, :, start + layout.text_length // 3 : start + layout.text_length] = math.nan
    with sage_emulation.options(capability=capability):  # 89: mma.sync, 90: warpgroups
        codes, expected = cuda_sage.quantize(in_place, places), cuda_sage.quantize(moved)
        out, lse = cuda_sage.attend(in_place, codes, places)
        moved_out, moved_lse = cuda_sage.attend(moved, expected)
    for got, wanted in zip(codes, expected, strict=True):
        if got is not codes.lse_shift:  # rows of padding hold what nobody reads
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(out, layout.from_tiles(moved_out)) and torch.equal(lse, moved_lse)


def test_the_table_of_places():
    layout = LAYOUTS["ragged"]
    places = layout.tile_places()
    numbers = torch.arange(layout.sequence_length)[:, None] + 1
    assert places.dtype == torch.int32
    assert torch.equal(places.long() + 1, layout.to_tiles(numbers)[:, 0])


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.usefixtures("_on_cpu")
def test_sliding_tile_moves_nothing(layout, monkeypatch):
    """The same call on tokens that were moved; compiled, too."""
    video = LAYOUTS["text"]
    q, k, v = _raster(video, "bhsd", (64, 64), torch.float16)
    mask = sliding_tile_mask(video, ((1, 1, 1),), text_length=5)
    moved = forward_call(*(video.to_tiles(x) for x in (q, k, v)), mask)
    expected = video.from_tiles(cuda_sage._forward(moved)[0])
    if layout == "bshd":
        q, k, v, expected = (x.transpose(1, 2) for x in (q, k, v, expected))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sliding_tile(
            q, k, v, (2, 7, 8), (1, 1, 1), tile=(2, 4, 8), text_length=5, layout=layout,
            precision="sage_fp8",
        )  # fmt: skip

    runs = [call]
    if layout == "bshd":
        runs.append(torch.compile(call, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(VideoLayout, "to_tiles", None)  # nothing else may move a token
    monkeypatch.setattr(VideoLayout, "from_tiles", None)
    for run in runs:
        out = run(q, k, v)
        assert torch.equal(out, expected) and out.stride() == q.stride()


def test_other_backends_are_given_moved_tokens():
    """The operator under torch.compile, and a backend that reads no raster order."""
    video = LAYOUTS["ragged"]
    q, k, v = (x.transpose(1, 2) for x in _raster(video, "bshd", (16, 24), torch.float32))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sliding_tile(
            q, k, v, (3, 5, 9), (1, 2, 1), tile=(2, 4, 8), layout="bshd", precision="sage_fp16",
            backend="reference",
        )  # fmt: skip

    expected = sliding_tile(
        q.double(), k.double(), v.double(), (3, 5, 9), (1, 2, 1), tile=(2, 4, 8), layout="bshd",
        backend="reference",
    )  # fmt: skip
    out = call(q, k, v)
    assert (out - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v), out)
    with use_backend("reference"):
        assert torch.equal(call(q, k, v), out)
    empty = [x[:0] for x in (q, k, v)]
    assert call(*empty).shape == (0, *out.shape[1:])


def test_the_binding_refuses_places_that_do_not_fit():
    q, k, v = qkv((70, 70))
    places = torch.arange(70, dtype=torch.int32)
    for wrong, message in (
        (places.long(), "places has the wrong dtype"),
        (places[None], "places has 2 dimensions"),
        (torch.arange(140, dtype=torch.int32)[::2], "places must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cuda_sage.quantize(forward_call(q, k, v), wrong)
    with pytest.raises(RuntimeError, match="differ in length"):
        cuda_sage.quantize(forward_call(q, k[:, :, :60], v[:, :, :60]), places)
