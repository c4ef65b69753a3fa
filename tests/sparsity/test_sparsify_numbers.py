"""What a sparsified module computes, for which video, and which of its calls are self-attention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from sparsity_cases import (
    GRID,
    LENGTH,
    FusedAttention,
    VideoAttention,
    VideoModel,
    attention_of,
    config,
    defined,
    defined_output,
    error,
    made,
    video,
    vsa,
)
from torch import Tensor, nn

import video_attn.sparsity as mtsa
from video_attn.integrations.attention_call import AttentionCall

# -- what runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, top_k", [(1.0, 8), (0.5, 4), (0.3, 3), (0.25, 2), (0.01, 1)])
def test_the_output_is_that_of_the_definition(ratio: float, top_k: int) -> None:
    module, x = made(VideoAttention), video()
    dense = module(x)
    mtsa.sparsify(module, config("*", ratio=ratio, video_shape=GRID))
    out = module(x)
    assert error(out, defined_output(module, x, GRID, top_k)) < 1e-5
    assert (error(out, dense) < 1e-5) == (ratio == 1.0)


def test_gates() -> None:
    """A trained gate weights the coarse branch; without one it is left out, or added on request."""
    module, x = made(lambda: VideoAttention(gate=True)), video()
    mtsa.sparsify(module, config("*", video_shape=GRID))
    weight = module.to_gate_compress(x).unflatten(2, (2, -1)).transpose(1, 2)
    assert error(module(x), defined_output(module, x, GRID, 4, weight)) < 1e-5
    mtsa.set_sparse_attention_attribute(module, "*", {"gate": "none"})
    assert error(module(x), defined_output(module, x, GRID, 4)) < 1e-5

    module = mtsa.sparsify(made(VideoAttention), config("*", gate="sum", video_shape=GRID))
    assert error(module(x), defined_output(module, x, GRID, 4, 1.0)) < 1e-5
    mtsa.set_sparse_attention_attribute(module, "*", {"gate": "auto"})
    assert error(module(x), defined_output(module, x, GRID, 4)) < 1e-5


def test_scores_of_fastvideo_rank_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """``score_dtype`` reaches the function that ranks, with statistics and without."""
    from video_attn.functional import patterns
    from video_attn.sparsity import methods

    given = []

    def ranked(*args: Any, **options: Any) -> Any:
        given.append(options.get("score_dtype"))
        return original(*args, **options)

    original = patterns.video_sparse
    monkeypatch.setattr(patterns, "video_sparse", ranked)
    monkeypatch.setattr(methods, "video_sparse", ranked)
    module, x = made(VideoAttention), video()
    mtsa.sparsify(module, config("*", score_dtype="bfloat16", video_shape=GRID))
    module(x)
    mtsa.set_sparse_attention_attribute(module, "*", {"collect_stats": True})
    module(x)
    assert given == [torch.bfloat16, torch.bfloat16]


def test_forward_attention_alone() -> None:
    """The video shape given in the call stays."""
    module = mtsa.sparsify(made(VideoAttention), config("*"))
    query, key, value = (torch.randn(2, 2, LENGTH, 8) for _ in range(3))
    with pytest.raises(ValueError, match="video_shape must be set"):
        module.forward_attention(query, key, value)
    gate = torch.randn(2, 2, LENGTH, 8)
    out = module.forward_attention(query, key, value, gate, video_shape=GRID)
    call = AttentionCall(query, key, value)
    assert error(out, defined(call, GRID, (4, 4, 4), 4, gate)) < 1e-5
    assert module.get_threshold_info()["video_shape"] == GRID
    out = module.forward_attention(query, key, value)
    assert error(out, defined(call, GRID, (4, 4, 4), 4)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_gradients(dtype: torch.dtype) -> None:
    module = made(lambda: VideoAttention(gate=True)).to(dtype)
    mtsa.sparsify(module, config("*", video_shape=GRID))
    x = video(dtype=dtype).requires_grad_()
    out = module(x)
    assert out.dtype == dtype and out.isfinite().all()
    out.float().square().sum().backward()
    for tensor in (x, *module.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any()


@pytest.mark.parametrize("batch, grid", [(1, (1, 1, 1)), (1, (4, 16, 16)), (1, (8, 16, 16)),
                                         (8, (2, 4, 4)), (16, (1, 3, 5))])  # fmt: skip
def test_lengths_and_batches(batch: int, grid: Any) -> None:
    length = grid[0] * grid[1] * grid[2]
    module, x = made(VideoAttention), video(batch, length)
    dense = module(x)
    mtsa.sparsify(module, config("*", ratio=1.0, video_shape=grid))
    assert error(module(x), dense) < 1e-5 if length > 1 else torch.allclose(module(x), dense)


def test_fused_projections_and_grouped_heads() -> None:
    module, x = made(FusedAttention), video()
    dense = module(x)
    mtsa.sparsify(module, config("*", ratio=1.0, video_shape=GRID))
    assert error(module(x), dense) < 1e-5
    mtsa.set_sparse_attention_attribute(module, "*", {"top_k_ratio": 0.25})
    assert error(module(x), dense) > 1e-2


# -- the shape of the video ------------------------------------------------------------------------


def test_a_missing_shape_says_how_to_set_it() -> None:
    model = mtsa.sparsify(made(VideoModel), config())
    with pytest.raises(ValueError, match="video_shape must be set") as raised:
        model(video(), video(2, 5))
    for words in (f"{LENGTH} tokens", "blocks.0.attn1", "set_video_shape", "with video_shape("):
        assert words in str(raised.value)


def test_every_way_to_set_it() -> None:
    model, x, text = mtsa.sparsify(made(VideoModel), config(ratio=0.25)), video(), video(2, 5)
    with mtsa.video_shape(model, GRID):
        expected = model(x, text)
    for _, module in mtsa.get_named_sparse_attention_modules(model):
        module.set_video_shape(list(GRID))
    assert torch.equal(model(x, text), expected)
    for _, module in mtsa.get_named_sparse_attention_modules(model):
        module.set_video_shape(None)
    mtsa.set_sparse_attention_attribute(model, "*attn1", {"video_shape": GRID})
    assert torch.equal(model(x, text), expected)
    with mtsa.video_shape(model, (1, 1, LENGTH)):  # the nearest counts
        assert not torch.equal(model(x, text), expected)


def test_a_shape_that_does_not_fit() -> None:
    module = mtsa.sparsify(made(VideoAttention), config("*", video_shape=(4, 4, 4)))
    with pytest.raises(ValueError, match="does not match video shape") as raised:
        module(video())
    assert str(LENGTH) in str(raised.value) and "64 tokens" in str(raised.value)
    with pytest.raises(ValueError, match="video_shape must have 3 elements"):
        module.set_video_shape((4, 4))
    with (
        pytest.raises(ValueError, match="shape must hold positive"),
        mtsa.video_shape(module, (0, 1, 1)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="step must be"),
        mtsa.video_shape(module, GRID, step=(3, 3)),
    ):
        pass


@pytest.mark.parametrize("text_first", [False, True])
def test_tokens_beside_the_video_are_seen_by_all(text_first: bool) -> None:
    module, x = made(VideoAttention), video(2, LENGTH + 9)
    mtsa.sparsify(module, config("*", ratio=0.25))
    with mtsa.video_shape(module, GRID, text_length=9, text_first=text_first):
        out = module(x)
    call = attention_of(module, x)
    expected = defined(call, GRID, (4, 4, 4), 2, text_first=text_first).transpose(1, 2).flatten(2)
    assert error(out, expected) < 1e-5
    with pytest.raises(ValueError, match="219.*does not match"), mtsa.video_shape(module, GRID):
        module(x)


def test_two_shapes_of_one_length() -> None:
    """(16, 28) and (28, 16) have the same tokens and other tiles."""
    module, x = made(VideoAttention), video()
    mtsa.sparsify(module, config("*", ratio=0.25))
    outs = []
    for shape in (GRID, GRID[::-1]):
        with mtsa.video_shape(module, shape):
            outs.append(module(x))
        assert error(outs[-1], defined_output(module, x, shape, 2)) < 1e-5
    assert error(outs[0], outs[1]) > 1e-2


# -- self-attention by structure -------------------------------------------------------------------


def test_cross_attention_of_equal_length_stays_dense() -> None:
    model, x, text = made(VideoModel), video(), video(seed=2)
    assert x.shape == text.shape
    mtsa.sparsify(model, {"sparse_cfg": {"*": vsa(1.0, video_shape=GRID)}})
    with pytest.warns(UserWarning, match="taken for cross-attention"):
        model(x, text)
    states = {n: m._sparse_attention for n, m in mtsa.get_named_sparse_attention_modules(model)}
    assert [s.sparse_calls for s in states.values()] == [1, 0, 1, 0]
    assert states["blocks.0.attn2"].dense_calls == {"cross-attention": 1}


def test_context_that_is_the_input_is_self_attention() -> None:
    module, x = mtsa.sparsify(made(VideoAttention), config("*", video_shape=GRID)), video()
    assert torch.equal(module(x, context=x), module(x))
    assert module._sparse_attention.sparse_calls == 2


def test_a_module_that_never_reaches_attention_warns_once() -> None:
    class OwnAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(-1) @ x

    module = mtsa.sparsify(OwnAttention(), config("*", video_shape=GRID))
    with pytest.warns(UserWarning, match="never called scaled_dot_product_attention"):
        module(video())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(video())
    assert sum(module._sparse_attention.dense_calls.values()) == 2


def test_containers_are_not_taken_for_attention() -> None:
    class AttentionBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = VideoAttention()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = mtsa.sparsify(AttentionBlock(), config("*"))
    assert [name for name, _ in mtsa.get_named_sparse_attention_modules(model)] == ["inner"]
