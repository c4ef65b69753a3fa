"""Which way tokens in raster order take: read where they are, or moved to tile order and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_samples import attention_raster
from torch import Tensor

from video_attn import VideoLayout, attention, registry, sliding_tile, sliding_tile_mask
from video_attn.calls import ForwardCall
from video_attn.quantize import QuantizationOptions

GRID, TILE, WINDOW, TEXT = (4, 4, 4), (2, 4, 2), (1, 1, 3), 9
VIDEO = VideoLayout(GRID, TILE, TEXT)


class Reader:
    """The reference as a backend that reads tiles of raster order; it counts what it is asked."""

    def __init__(self) -> None:
        self.read = self.moved = 0
        self.refuses = False

    def reads(self, video: VideoLayout, *tensors: Tensor) -> bool:
        assert not video.is_ragged and not video.text_first
        return not self.refuses and all(x.stride(-1) == 1 for x in tensors)

    def forward(self, call: ForwardCall) -> tuple[Tensor, Tensor]:
        run = registry._backends["reference"].forward
        if call.video is None:
            self.moved += 1
            return run(call)
        self.read += 1
        assert call.video == VIDEO
        q, k, v = (call.video.to_tiles(x) for x in (call.q, call.k, call.v))
        out, lse = run(replace(call, q=q, k=k, v=v, video=None))
        result, result_lse = call.empty_results()
        result.copy_(call.video.from_tiles(out))
        return result, result_lse.copy_(call.video.from_tiles(lse, 2))


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """The best backend of all, while the test runs."""
    made = Reader()
    row = replace(
        registry._backends["reference"], name="reader", priority=1000, forward=made.forward,
        reads_raster=made.reads,
    )  # fmt: skip
    monkeypatch.setitem(registry._backends, "reader", row)
    registry._select.cache_clear()
    yield made
    registry._select.cache_clear()
    torch.compiler.reset()


def tensors(layout: str = "bhsd", **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 2, VIDEO.sequence_length, 2, 8, generator=generator, dtype=torch.float64)
    x = x if layout == "bshd" else x.transpose(2, 3).contiguous()
    return [y.clone().requires_grad_(options.get("grad", False)) for y in x]


def moved(q: Tensor, k: Tensor, v: Tensor, layout: str) -> Tensor:
    """The same by hand."""
    dim = 1 if layout == "bshd" else 2
    mask = sliding_tile_mask(VIDEO, WINDOW, text_length=5)
    q, k, v = (VIDEO.to_tiles(x, dim) for x in (q, k, v))
    return VIDEO.from_tiles(attention(q, k, v, mask, layout=layout, backend="reference"), dim)


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return sliding_tile(q, k, v, GRID, WINDOW, tile=TILE, text_length=5, **options)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_tokens_are_read_where_they_are(layout, reader):
    q, k, v = tensors(layout)
    out = run(q, k, v, layout=layout)
    assert (reader.read, reader.moved) == (1, 0)
    torch.testing.assert_close(out, moved(q, k, v, layout), rtol=0, atol=0)
    assert out.stride() == q.stride()


@pytest.mark.parametrize("case", ["refused", "text_first", "ragged", "gradient", "other", "dual"])
def test_tokens_are_moved_where_nobody_can_read_them(case, reader):
    q, k, v = tensors(grad=case == "gradient")
    options: dict[str, Any] = {}
    reader.refuses = case == "refused"
    if case == "text_first":
        options["text_first"] = True
    elif case == "ragged":
        options["tile"] = (3, 4, 2)
    elif case == "other":
        options["backend"] = "reference"
    options = {"tile": TILE, "text_length": 5, **options}
    if case == "dual":
        with torch.autograd.forward_ad.dual_level():
            q = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            out = torch.autograd.forward_ad.unpack_dual(
                sliding_tile(q, k, v, GRID, WINDOW, **options)
            )
            assert out.tangent is not None
    else:
        out = sliding_tile(q, k, v, GRID, WINDOW, **options)
        assert out.requires_grad == (case == "gradient")
    assert reader.read == 0 and reader.moved == (0 if case == "other" else 1)


def test_options_are_checked_on_the_way_that_reads(reader):
    q, k, v = tensors()
    for name, value in (("scale", -1.0), ("backend", "none"), ("deterministic", 1)):
        with pytest.raises((TypeError, ValueError), match=name):
            run(q, k, v, **{name: value})
    with pytest.raises(ValueError, match="quantization"):
        run(q, k, v, quantization=QuantizationOptions())
    assert reader.read == reader.moved == 0
    expected = moved(q * 0.5, k, v, "bhsd")
    torch.testing.assert_close(run(q, k, v, scale=0.5 / 8**0.5), expected)


def test_an_empty_batch_goes_to_no_kernel(reader):
    q, k, v = (x[:0] for x in tensors())
    assert sliding_tile(q, k, v, GRID, WINDOW, tile=TILE).shape == q.shape
    assert reader.read == reader.moved == 0


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_compiled_code_reads_too(layout, reader):
    torch.compiler.reset()
    q, k, v = tensors(layout)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v, layout=layout)
    assert (reader.read, reader.moved) == (1, 0)
    torch.testing.assert_close(out, moved(q, k, v, layout), rtol=0, atol=0)
    reader.refuses = True  # what was decided while it was traced does not hold any more
    out = compiled(q, k, v, layout=layout)
    assert (reader.read, reader.moved) == (1, 1)
    torch.testing.assert_close(out, moved(q, k, v, layout), rtol=0, atol=0)


def test_compiled_code_keeps_its_gathers_where_no_backend_reads(reader):
    """Inductor makes them a part of what comes before and after."""
    reader.refuses = True
    torch.compiler.reset()
    names: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(run, backend=look, fullgraph=True)(*tensors())
    assert any("attention_forward" in name for name in names)
    assert not any("attention_raster" in name for name in names)


def test_compiled_code_that_is_differentiated_moves_tokens(reader):
    torch.compiler.reset()
    inputs = tensors(grad=True)
    torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs).square().sum().backward()
    grads = [x.grad for x in inputs]
    again = tensors(grad=True)
    moved(*again, "bhsd").square().sum().backward()
    assert reader.read == 0
    for grad, x in zip(grads, again, strict=True):
        torch.testing.assert_close(grad, x.grad)


def test_the_operator_has_no_derivative():
    q, k, v, *rest = next(attention_raster())
    out = torch.ops.video_attn.attention_raster(q.requires_grad_(), k, v, *rest)
    with pytest.raises(RuntimeError, match="no derivatives"):
        out.sum().backward()
