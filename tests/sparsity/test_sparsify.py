"""sparsify on any torch module: what is converted and refused, switches, statistics, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from sparsity_cases import (
    GRID,
    LENGTH,
    WIDTH,
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
from torch.nn import functional as F

import video_attn.sparsity as mtsa
from video_attn.integrations.attention_call import AttentionCall
from video_attn.sparsity.config import VSA_DEFAULT

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
