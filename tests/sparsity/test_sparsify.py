"""sparsify on any torch module: what is converted, what runs, what is refused, what comes back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from sparsity_cases import (
    GRID,
    LENGTH,
    WIDTH,
    FusedAttention,
    VideoAttention,
    VideoModel,
    config,
    defined,
    error,
    made,
    video,
    vsa,
)
from torch import Tensor, nn
from torch.nn import functional as F

import video_attn.sparsity as mtsa
from video_attn.integrations.attention_call import AttentionCall
from video_attn.sparsity.config import VSA_DEFAULT


def attention_of(module: Any, x: Tensor) -> AttentionCall:
    """What a VideoAttention asks of attention."""
    heads = [
        project(x).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        for project in (module.to_q, module.to_k, module.to_v)
    ]
    return AttentionCall(*heads)


# -- what is converted -----------------------------------------------------------------------------


def test_the_documents_code_runs() -> None:
    """With `import video_attn.sparsity as mtsa` for modelopt's name, to the letter."""

    class VideoDiffusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = VideoAttention(64, 2)

        def forward(self, video_latents: Tensor) -> Tensor:
            return self.attention(video_latents)

    model = made(VideoDiffusion)
    with pytest.warns(UserWarning, match=r"pattern '\*attn\*' matches no attention module"):
        model = mtsa.sparsify(model, config=VSA_DEFAULT)
    custom_config = {
        "sparse_cfg": {
            "*attention*": {
                "method": "vsa",
                "block_size_3d": (4, 4, 4),
                "top_k_ratio": 0.3,  # 70% sparsity
                "video_shape": (4, 8, 8),
                "enable": True,
            },
            "default": {"enable": False},
        },
    }
    model = mtsa.sparsify(model, config=custom_config)
    video_latents = torch.randn(1, 4 * 8 * 8, 64)
    output = model(video_latents)
    assert error(output, defined_output(model.attention, video_latents, (4, 8, 8), 2)) < 1e-5


def defined_output(module: Any, x: Tensor, grid: Any, top_k: int, gate: Any = 0.0) -> Tensor:
    out = defined(attention_of(module, x), grid, (4, 4, 4), top_k, gate)
    return out.transpose(1, 2).flatten(2)


def test_modules_become_instances_in_place() -> None:
    model = made(VideoModel)
    names, attention = set(model.state_dict()), model.blocks[0].attn1
    assert mtsa.sparsify(model, config()) is model
    assert model.blocks[0].attn1 is attention
    assert isinstance(attention, mtsa.SparseAttentionModule) and isinstance(
        attention, VideoAttention
    )
    assert set(model.state_dict()) == names
    modules = mtsa.get_named_sparse_attention_modules(model)
    assert [name for name, _ in modules] == [
        "blocks.0.attn1", "blocks.0.attn2", "blocks.1.attn1", "blocks.1.attn2",
    ]  # fmt: skip
    assert [module for _, module in modules] == [
        module for module in model.modules() if isinstance(module, mtsa.SparseAttentionModule)
    ]
    assert [module.is_enabled for _, module in modules] == [True, False, True, False]


def test_a_callable_and_a_later_match() -> None:
    model = made(VideoModel)
    mtsa.sparsify(model, {"sparse_cfg": {
        lambda name: name.endswith("attn1"): vsa(0.3, collect_stats=True),
        "blocks.1.*": {"top_k_ratio": 0.25},
        "*.1.attn2": {"enable": False},
        "default": {"enable": False},
    }})  # fmt: skip
    infos = {n: m.get_threshold_info() for n, m in mtsa.get_named_sparse_attention_modules(model)}
    assert infos["blocks.0.attn1"]["top_k_ratio"] == 0.3
    assert infos["blocks.1.attn1"]["top_k_ratio"] == 0.25
    assert model.blocks[1].attn1._sparse_attention.attributes.collect_stats
    assert not model.blocks[1].attn2.is_enabled
    assert infos["blocks.0.attn2"] == {"type": "none", "value": None}


def test_no_default_means_off() -> None:
    model = mtsa.sparsify(made(VideoModel), {"sparse_cfg": {"*.0.attn1": vsa()}})
    enabled = [m.is_enabled for _, m in mtsa.get_named_sparse_attention_modules(model)]
    assert enabled == [True, False, False, False]


def test_a_pattern_without_match_warns_and_names_what_is_near() -> None:
    model = made(VideoModel)
    with pytest.warns(UserWarning, match=r"'\*\.atn1'.*'blocks\.\*\.attn1'"):
        mtsa.sparsify(model, config("*.atn1"))
    assert mtsa.is_attn_sparsified(model)
    assert not any(m.is_enabled for _, m in mtsa.get_named_sparse_attention_modules(model))


@pytest.mark.parametrize("wrong", [
    {"sparse_cfg": {"*attn1": vsa(), "*attn2": {"top_k_ratio": 2.0}}},
    {"sparse_cfg": {"*attn1": vsa(), "default": {"unknown": 1}}},
    {"sparse_cfg": {"*attn1": vsa(), lambda name: 1: vsa()}},
    # Each is right alone; together, a module would get window without its method.
    {"sparse_cfg": {"*attn1": {"window": (1, 1, 1)}}},
])  # fmt: skip
def test_everything_is_checked_before_the_model_is_touched(wrong: Any) -> None:
    model = made(VideoModel)
    with pytest.raises((ValueError, TypeError)):
        mtsa.sparsify(model, wrong)
    assert not mtsa.is_attn_sparsified(model)
    assert type(model.blocks[0].attn1) is VideoAttention


def test_more_dense_layers_than_there_are() -> None:
    model = made(VideoModel)
    with pytest.raises(ValueError, match="dense_layers of 'blocks.0.attn1' must be at most 4, got"):
        mtsa.sparsify(model, config(schedule={"dense_layers": 5}))
    assert not mtsa.is_attn_sparsified(model)


def test_a_class_that_changed_since_is_not_lost() -> None:
    """As fully_shard does; taking ours away would take that one too."""
    module = mtsa.sparsify(made(VideoAttention), config("*"))
    module.__class__ = type("Wrapped", (type(module),), {})
    with pytest.raises(RuntimeError, match="is a Wrapped now"):
        mtsa.unsparsify(module)
    module.__class__ = type(module).__mro__[1]
    assert type(mtsa.unsparsify(module)) is VideoAttention


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="model must be a torch module, or a diffusers pipeline"):
        mtsa.sparsify("model", config())
    with pytest.raises(TypeError, match="forward_loop must be callable or None, got 3"):
        mtsa.sparsify(made(VideoModel), config(), forward_loop=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not sparsified"):
        mtsa.enable_sparse_attention(made(VideoModel), "*")
    assert not mtsa.is_attn_sparsified(made(VideoModel))


def test_a_forward_loop_is_accepted() -> None:
    loop = lambda model: pytest.fail("nothing here needs a calibration")  # noqa: E731
    assert mtsa.is_attn_sparsified(mtsa.sparsify(made(VideoModel), config(), forward_loop=loop))


def test_the_second_sparsify_counts() -> None:
    model = mtsa.sparsify(made(VideoModel), config(ratio=0.25))
    mtsa.sparsify(model, {"sparse_cfg": {"*attn2": vsa(0.5), "*attn1": {"enable": False}}})
    modules = dict(mtsa.get_named_sparse_attention_modules(model))
    assert [m.is_enabled for m in modules.values()] == [False, True, False, True]
    assert type(modules["blocks.0.attn1"]).__mro__[2] is VideoAttention


def test_methods_mixed_in_one_model() -> None:
    model, x, text = made(VideoModel), video(), video(2, 5)
    dense = model(x, text)
    mtsa.sparsify(model, {"sparse_cfg": {
        "blocks.0.attn1": {"method": "sta", "window": (9, 9, 9), "block_size_3d": (2, 2, 2)},
        "blocks.1.attn1": {"method": "radial", "decay_factor": 1e6, "block_size": 16},
        "*.1.attn1": {"split_width": 0},
        "*": {"video_shape": GRID},
    }})  # fmt: skip
    assert error(model(x, text), dense) < 1e-5
    mtsa.set_sparse_attention_attribute(model, "blocks.0.attn1", {"window": (1, 1, 1)})
    assert error(model(x, text), dense) > 1e-2
    mtsa.set_sparse_attention_attribute(
        model, "*attn1", {"method": "dense", "backend": "reference"}
    )
    assert error(model(x, text), dense) < 1e-5


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


# -- switches, state, summary ----------------------------------------------------------------------


def test_disabled_is_dense_to_the_bit() -> None:
    model, x, text = made(VideoModel), video(), video(2, 5)
    dense = model(x, text)
    mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
    sparse = model(x, text)
    assert not torch.equal(sparse, dense)
    mtsa.disable_sparse_attention(model, "*")
    assert torch.equal(model(x, text), dense)
    mtsa.enable_sparse_attention(model, lambda name: name.endswith("attn1"))
    assert torch.equal(model(x, text), sparse)
    with pytest.warns(UserWarning, match="2 modules have no method"):
        mtsa.enable_sparse_attention(model, "*")
    with pytest.raises(ValueError, match="no method to enable"):
        model.blocks[0].attn2.enable()
    with pytest.warns(UserWarning, match="matches no attention module"):
        mtsa.disable_sparse_attention(model, "*attn3")


def test_unsparsify_leaves_nothing() -> None:
    model, x, text = made(VideoModel), video(), video(2, 5)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    dense = model(x, text)
    mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
    mtsa.add_gates(model)
    model(x, text)
    assert mtsa.unsparsify(model) is model
    assert not mtsa.is_attn_sparsified(model)
    assert [type(module) for module in model.modules()] == classes
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(model(x, text), dense)
    assert mtsa.unsparsify(model) is model


def test_attributes_change_together_or_not_at_all() -> None:
    model = mtsa.sparsify(made(VideoModel), {"sparse_cfg": {
        "blocks.0.attn1": vsa(), "blocks.1.attn1": {"method": "sta"},
    }})  # fmt: skip
    with pytest.raises(ValueError, match="top_k_ratio"):
        mtsa.set_sparse_attention_attribute(model, "*attn1", {"top_k_ratio": 0.2})
    assert model.blocks[0].attn1.get_threshold_info()["top_k_ratio"] == 0.5
    mtsa.set_sparse_attention_attribute(model, "blocks.0.attn1", {"top_k_ratio": 0.2})
    assert model.blocks[0].attn1.get_threshold_info() == {
        "type": "vsa", "block_size_3d": (4, 4, 4), "top_k_ratio": 0.2, "top_k": None,
        "gate": "auto", "video_shape": None,
    }  # fmt: skip


def test_statistics_of_the_real_masks() -> None:
    model, x, text = made(VideoModel), video(), video(2, 5)
    mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
    assert model.blocks[0].attn1.get_stats() == {}
    mtsa.set_sparse_attention_attribute(model, "*attn1", {"collect_stats": True})
    stats = model.blocks[0].attn1.get_stats()
    assert (stats["module"], stats["total_calls"], stats["average_sparsity"]) == (
        "blocks.0.attn1", 0, 0.0,
    )  # fmt: skip
    model(x, text)
    model(x, text)
    stats = model.blocks[1].attn1.get_stats()
    assert stats["total_calls"] == 2 and stats["video_shape"] == GRID
    # Tiles are ragged: the share of pairs is not the share of tiles.
    assert 0.5 < stats["average_sparsity"] < 0.9 and abs(stats["average_sparsity"] - 0.75) > 1e-3


def test_density_is_that_of_the_definition() -> None:
    module, x = made(VideoAttention), video()
    mtsa.sparsify(module, config("*", ratio=0.25, video_shape=GRID, collect_stats=True))
    module(x)
    call = attention_of(module, x)
    ones = AttentionCall(call.query, call.key, torch.eye(LENGTH).expand(2, 2, -1, -1))
    seen = defined(ones, GRID, (4, 4, 4), 2).ne(0).double().mean()
    assert abs(1 - module.get_stats()["average_sparsity"] - float(seen)) < 1e-9


def test_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, text = made(VideoModel), video(), video(2, 5)
    mtsa.print_sparse_attention_summary(model)
    assert "no sparsified modules" in capsys.readouterr().out
    mtsa.sparsify(
        model, {"sparse_cfg": {"*": vsa(0.25, video_shape=GRID), "*.1.attn2": {"enable": False}}}
    )
    model(x, text)
    mtsa.print_sparse_attention_summary(model)
    out = capsys.readouterr().out
    assert out.startswith("Sparse attention: 3/4 modules enabled\n")
    lines = {line.split("  ")[0]: line for line in out.splitlines()[2:]}
    first = lines["blocks.*.attn1 (2)"].split()
    assert first[2:] == ["vsa", "4x4x4", "0.25", "none", "5x6x7", "~0.250", "2", "0"]
    assert "cross-attention" in out and "vsa, off" in out


# -- copies ----------------------------------------------------------------------------------------


def test_copies_and_pickles_stand_alone() -> None:
    model, x, text = made(VideoModel), video(), video(2, 5)
    mtsa.sparsify(model, config(ratio=0.25, video_shape=GRID))
    expected = model(x, text)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
              torch.load(buffer, weights_only=False)]  # fmt: skip
    mtsa.set_sparse_attention_attribute(model, "*attn1", {"top_k_ratio": 1.0})
    for other in copies:
        assert torch.equal(other(x, text), expected)
        assert isinstance(other.blocks[0].attn1, mtsa.SparseAttentionModule)
    assert model.blocks[0].attn1._sparse_attention.sparse_calls == 1
    mtsa.unsparsify(copies[0])
    assert mtsa.is_attn_sparsified(model)


def test_a_forward_on_the_instance_is_kept() -> None:
    """As hooks of diffusers and accelerate put it there; before sparsify, and after it."""
    module, x = made(VideoAttention), video()
    called = []
    inner = module.forward

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        called.append(True)
        return inner(*args, **kwargs)

    module.forward = counted
    mtsa.sparsify(module, config("*", ratio=0.25, video_shape=GRID))
    out = module(x)
    assert called and error(out, defined_output(module, x, GRID, 2)) < 1e-5
    mtsa.unsparsify(module)
    assert module.forward is counted


def test_offloading_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    module, x = made(VideoAttention), video()
    hooks.add_hook_to_module(module, hooks.ModelHook())
    mtsa.sparsify(module, config("*", ratio=0.25, video_shape=GRID))
    expected = defined_output(module, x, GRID, 2)
    assert error(module(x), expected) < 1e-5
    hooks.remove_hook_from_module(module)
    assert error(module(x), expected) < 1e-5
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert error(module(x), expected) < 1e-5
    mtsa.unsparsify(module)
    hooks.remove_hook_from_module(module)
    assert error(module(x), expected) > 1e-2


def test_sdpa_of_others_is_not_touched() -> None:
    """Nothing is patched for the process."""
    original = F.scaled_dot_product_attention
    module, x = mtsa.sparsify(made(VideoAttention), config("*", video_shape=GRID)), video()
    module(x)
    assert F.scaled_dot_product_attention is original
    other = made(VideoAttention)
    assert torch.equal(other(x), made(VideoAttention)(x))
    assert other.to_q.in_features == WIDTH
