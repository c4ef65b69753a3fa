"""What people's programs do around the functions: default devices and dtypes, meta tensors, export,
lists changed in place, copies on disk, forks, second imports.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import video_attn
from radial_attn.attn_mask import SceneAwareMaskMap
from st_attn import sliding_tile_attention
from video_attn import (
    BlockMask,
    RadialRule,
    Scenes,
    VideoLayout,
    attention,
    clear_caches,
    named_attention,
    radial,
    radial_mask,
    sageattn,
    sliding_tile,
    sliding_tile_mask,
    video_sparse,
)
from video_attn.static_cache import kept_bytes
from vsa import video_sparse_attn

GRID = (3, 4, 5)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda q: attention(q, q, q),
    "sliding_tile": lambda q: sliding_tile(q, q, q, GRID, (1, 2, 1), tile=(2, 2, 2), text_length=5),
    "st_attn": lambda q: sliding_tile_attention(
        q, q, q, (1, 1, 1), 7, True, GRID, tile_size=(2, 2, 2)
    ),
    "video_sparse": lambda q: video_sparse(q, q, q, GRID, top_k_ratio=0.3, tile=(2, 2, 2)),
    "vsa": lambda q: video_sparse_attn(q[:, :, :64], q[:, :, :64], q[:, :, :64], None, 2, 16),
    "radial": lambda q: radial(q, q, q, GRID, block_size=16),
    "scenes": lambda q: radial(
        q, q, q, GRID, block_size=16, scenes=Scenes([0, 1, 3], "adjacent", unit="latent")
    ),
    "sageattn": lambda q: sageattn(q, q, q),
    "fp8": lambda q: attention(q, q, q, precision="fp8", backend="reference"),
    "fav3": lambda q: named_attention(q, q, q, "fav3"),
    "masks": lambda q: radial_mask(
        VideoLayout(GRID, (1, 4, 5)), RadialRule(sink_frames=1), block_size=16
    ).to_dense().double(),
    "map": lambda q: SceneAwareMaskMap(60, 3, [0, 1, 3], "all", unit="latent").queryLogMask(
        q.cpu().transpose(1, 2), block_size=16
    ).double(),
}  # fmt: skip


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    make = torch.Generator("cpu").manual_seed(0)
    return torch.randn(1, 2, 67, 16, generator=make, dtype=torch.float32, device="cpu").to(dtype)


@pytest.fixture
def defaults() -> Iterator[None]:
    """Whatever a test sets as default device and dtype ends with it."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
        clear_caches()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_default_device(name, defaults):
    """A model that is built under torch.device("meta"), and one that is run with such a default."""
    q = tokens()
    expected = FUNCTIONS[name](q)
    clear_caches()  # the tables are built again, under that default
    with torch.device("meta"):
        assert torch.equal(FUNCTIONS[name](q), expected)
    clear_caches()
    torch.set_default_device("meta")
    assert torch.equal(FUNCTIONS[name](q), expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_another_default_dtype(name, default, defaults):
    q = tokens()
    expected = FUNCTIONS[name](q)
    clear_caches()
    torch.set_default_dtype(default)
    got = FUNCTIONS[name](q)
    assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["sage_fp16", "sage_fp8", "fp8"])
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_quantized_backends_under_another_default_dtype(precision, backend, default, defaults):
    q = tokens()

    def run() -> Tensor:
        options = {"smooth_v": True, "granularity": "per_block"}
        return attention(
            q, q, q, precision=precision, backend=backend,
            quantization=video_attn.quantize.QuantizationOptions(**options),
        )  # fmt: skip

    try:
        expected = run()
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    torch.set_default_dtype(default)
    assert torch.equal(run(), expected)


SHAPED = [name for name in FUNCTIONS if name not in ("masks", "map")]


@pytest.mark.parametrize("name", SHAPED)
def test_meta_and_fake_tensors_give_shapes(name):
    q = tokens()
    expected = FUNCTIONS[name](q)
    got = FUNCTIONS[name](q.to("meta"))
    assert (got.device.type, got.shape, got.dtype) == ("meta", expected.shape, expected.dtype)
    clear_caches()
    with FakeTensorMode():
        got = FUNCTIONS[name](torch.empty(q.shape))
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(FUNCTIONS[name](q), expected), "a fake table was kept"


@pytest.mark.parametrize("name", [n for n in SHAPED if n != "fp8"])
def test_compiles_with_dynamic_shapes(name):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True, backend="eager")
    q = tokens()
    for batch in (1, 3):
        x = q.repeat(batch, 1, 1, 1)
        torch.testing.assert_close(compiled(x), FUNCTIONS[name](x))


VIDEOS = [
    (3, 5, 6), (2, 4, 8), (5, 6, 7), (4, 8, 2), (3, 7, 9),
    (6, 4, 5), (2, 9, 3), (7, 2, 4), (4, 4, 4), (5, 3, 8),
]  # fmt: skip
OPEN_GRIDS: dict[str, Callable[..., Tensor]] = {
    "sliding_tile": lambda q, grid, n: sliding_tile(
        q, q, q, grid, [(1, 3, 2), (2, 1, 9)], tile=(2, 2, 2), text_length=n
    ),
    "video_sparse": lambda q, grid, n: video_sparse(
        q, q, q, grid, top_k_ratio=0.3, tile=(2, 2, 2), text_length=n
    ),
    "radial": lambda q, grid, n: radial(q, q, q, grid, block_size=16, text_length=n),
}


@pytest.mark.parametrize(
    ("name", "with_text"), [("sliding_tile", True), ("video_sparse", True), ("radial", False)]
)
def test_one_graph_serves_many_videos(name, with_text):
    """Ten grids, read from the latents, with prompts and batches of other sizes: one graph."""

    def model(latents: Tensor, prompt: Tensor | None, valid: int | None) -> Tensor:
        grid = latents.shape[2:]
        tokens = latents.flatten(2).mT.contiguous()
        if prompt is not None:
            tokens = torch.cat([tokens, prompt], 1)
        return OPEN_GRIDS[name](tokens.unflatten(2, (2, -1)).transpose(1, 2), grid, valid)

    def run(function: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, Tensor]:
        latents = inputs[0].clone().requires_grad_()
        out = function(latents, *inputs[1:])
        out.sin().sum().backward()
        assert latents.grad is not None
        return out, latents.grad

    torch._dynamo.reset()
    # Gradients are traced as well for one pattern, which takes the compiler longest.
    counter = CompileCounterWithBackend("aot_eager" if name == "radial" else "eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for number, grid in enumerate(VIDEOS):
        latents = torch.randn(4 if number % 2 else 9, 16, *grid)
        prompt, valid = None, None
        if with_text:
            length = 11 + number
            prompt, valid = torch.randn(latents.shape[0], length, 16), length - number % 3 - 1
        inputs = latents, prompt, valid
        for got, expected in zip(run(compiled, *inputs), run(model, *inputs), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_scales_that_are_symbols():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, s: attention(q, q, q, scale=s), fullgraph=True, dynamic=True, backend="eager"
    )
    q = tokens()
    for scale in (0.25, 0.5):
        torch.testing.assert_close(compiled(q, scale), attention(q, q, q, scale=scale))


# -- masks -----------------------------------------------------------------------------------------


def small_mask(lists: list[int], **options) -> BlockMask:
    indices = torch.tensor(lists, dtype=torch.int32)[None, None, :, None]
    return BlockMask.from_indices(indices, 16, 16, q_len=64, kv_len=64, **options)


def grads_of(
    q: Tensor, mask: BlockMask, function: Callable[..., Tensor] = attention
) -> tuple[Tensor, ...]:
    x = [q[:, :, :64].clone().requires_grad_() for _ in range(3)]
    function(*x, mask).square().sum().backward()
    return tuple(y.grad for y in x)


def test_lists_changed_in_place_change_the_gradients():
    q, mask = tokens().double(), small_mask([0, 1, 2, 3])
    grads_of(q, mask)
    mask.kv_indices.copy_(torch.tensor([1, 0, 3, 2])[None, None, :, None])
    for derived in (mask, mask.with_lens(None, None), mask.to("cpu"), mask.clone(), mask.compact()):
        for got, expected in zip(
            grads_of(q, derived), grads_of(q, small_mask([1, 0, 3, 2])), strict=True
        ):
            assert torch.equal(got, expected)


def test_compiled_code_sees_lists_changed_in_place():
    """Also where the mask has kept its transposed lists before it is compiled."""
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q, mask = tokens(), small_mask([0, 1, 2, 3])
    mask.transposed()
    grads_of(q, mask, compiled)
    mask.kv_indices.copy_(torch.tensor([1, 0, 3, 2])[None, None, :, None])
    for got, expected in zip(
        grads_of(q, mask, compiled), grads_of(q, small_mask([1, 0, 3, 2])), strict=True
    ):
        assert torch.equal(got, expected)


def test_lists_changed_between_forward_and_backward_are_noticed():
    mask, q = small_mask([0, 1, 2, 3]), tokens()[:, :, :64].requires_grad_()
    out = attention(q, q, q, mask)
    mask.kv_indices.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_writing_into_the_tensors_of_a_pattern_harms_no_later_call():
    layout = VideoLayout((4, 4, 4), (2, 2, 2), 3)
    first = sliding_tile_mask(layout, (1, 1, 2), transposed=True)
    expected = first.kv_indices.clone()
    first.kv_indices.zero_()
    again = sliding_tile_mask(layout, (1, 1, 2), transposed=True)
    assert torch.equal(again.kv_indices, expected)
    lens = layout.block_lens()
    before = lens.clone()
    lens.zero_()
    assert torch.equal(layout.block_lens(), before)
    own = again.clone()
    own.kv_indices.zero_()
    assert torch.equal(again.kv_indices, expected)


def test_caches_are_bounded_together_and_can_be_cleared():
    clear_caches()
    assert kept_bytes() == 0
    mask = radial_mask(VideoLayout(GRID, (1, 4, 5)), block_size=4)
    assert 0 < kept_bytes() <= 256 * 2**20
    assert radial_mask(VideoLayout(GRID, (1, 4, 5)), block_size=4).kv_indices is mask.kv_indices
    video_attn.clear_caches()
    assert kept_bytes() == 0
    again = radial_mask(VideoLayout(GRID, (1, 4, 5)), block_size=4)
    assert again.kv_indices is not mask.kv_indices
    assert torch.equal(again.kv_indices, mask.kv_indices)


def test_a_saved_mask_is_loaded_without_running_code():
    lens = torch.tensor([[16, 3, 16, 9]], dtype=torch.int32)
    mask = small_mask([3, 1, 2, 0], kv_block_lens=lens)
    mask.transposed()
    mask.kv_indices.copy_(torch.tensor([0, 1, 2, 3])[None, None, :, None])  # the kept ones are old
    file = io.BytesIO()
    torch.save({"mask": mask}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["mask"]
    q = tokens().double()
    for other in (loaded, copy.copy(mask), copy.deepcopy(mask)):
        assert torch.equal(other.to_token_mask(), mask.to_token_mask())
        for got, expected in zip(grads_of(q, other), grads_of(q, mask), strict=True):
            assert torch.equal(got, expected)
    with pytest.raises(TypeError, match="kv_indices must be int32"):
        mask.__setstate__(mask.__getstate__() | {"kv_indices": mask.kv_indices.long()})


class _Model(torch.nn.Module):
    def forward(self, q: Tensor, mask: BlockMask) -> Tensor:
        return attention(q, q, q, mask)


def test_export_with_a_mask_as_input():
    lens = torch.tensor([[16, 3, 16, 9]], dtype=torch.int32)
    q, masks = tokens()[:, :, :64], (small_mask([0, 1, 2, 3]), small_mask([3, 1, 2, 0]))
    masks = tuple(mask.with_lens(None, lens) for mask in masks)
    program = torch.export.export(_Model(), (q, masks[0]))
    for mask in masks:
        assert torch.equal(program.module()(q, mask), attention(q, q, q, mask))
    leaves, spec = pytree.tree_flatten(masks[0])
    assert len(leaves) == 3
    spec = pytree.treespec_loads(pytree.treespec_dumps(spec))
    again = pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.to_token_mask(), masks[0].to_token_mask())


@pytest.mark.parametrize("backward", [False, True])
def test_flop_counters_count_attended_pairs(backward):
    q = tokens()[:, :, :64].requires_grad_(backward)
    mask = small_mask([0, 3, 2, 1], kv_block_lens=torch.tensor([[16, 3, 16, 9]], dtype=torch.int32))
    for given, pairs in ((mask, mask.attended_pairs()), (None, 64 * 64)):
        with FlopCounterMode(display=False) as counter:
            out = attention(q, q, q, given)
            if backward:
                out.sum().backward()
        expected = 4 * 16 * pairs * 2  # two heads
        assert counter.get_total_flops() == expected * (3.5 if backward else 1)


def test_print_draws_the_blocks():
    keep = torch.eye(4, dtype=torch.bool)[None, None].expand(1, 2, 4, 4)
    text = str(BlockMask.from_dense(keep, 16, 16)).splitlines()
    assert text[0] == repr(BlockMask.from_dense(keep, 16, 16))
    assert text[1] == "batch 0 of 1, head 0 of 2:"
    assert text[2:] == ["█   ", " █  ", "  █ ", "   █"]
    half = torch.zeros(1, 1, 100, 300, dtype=torch.bool)
    half[..., :150] = True
    half[..., 50:, 149] = False
    rows = str(BlockMask.from_dense(half, 16, 16)).splitlines()[1:]
    assert len(rows) == 24 and {len(row) for row in rows} == {64}
    assert rows[0].startswith("█" * 31) and rows[0].endswith(" " * 31)
    assert str(BlockMask.from_dense(half.to("meta"), 16, 16)).startswith("BlockMask(")


# -- processes -------------------------------------------------------------------------------------

FORK = """
import os, signal, threading, torch, video_attn
from video_attn import VideoLayout, radial_mask, static_cache
torch.set_num_threads(1)
held, go = threading.Event(), threading.Event()
def hold():  # another thread is in the midst of a look-up
    with static_cache._lock:
        held.set()
        go.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    radial_mask(VideoLayout((3, 4, 5), (1, 4, 5)), block_size=16)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
go.set()
thread.join()
print("done")
"""

AGAIN = """
import sys, torch, video_attn
from video_attn import attention
q = torch.randn(1, 1, 20, 8)
expected = attention(q, q, q)
for name in [n for n in sys.modules if n.split(".")[0] == "video_attn"]:
    del sys.modules[name]
del video_attn, attention
try:
    import video_attn
except ImportError as error:
    assert "cannot be registered a second time" in str(error)
    print("done")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
@pytest.mark.parametrize("program", [FORK, AGAIN], ids=["fork", "import_again"])
def test_processes(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "done", done.stderr
