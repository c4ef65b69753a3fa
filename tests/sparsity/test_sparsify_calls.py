"""What a call may ask for besides attention over all keys; and nn.MultiheadAttention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from sparsity_cases import (
    GRID,
    LENGTH,
    WIDTH,
    VideoAttention,
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
from video_attn.functional.video_tokens import VideoTokens
from video_attn.integrations.attention_call import AttentionCall
from video_attn.sparsity.masks import UnsupportedError, valid_text

EXTRA = 6
VALID = (6, 2)


def padding(text_first: bool = False) -> Tensor:
    """bool [2, 1, 1, S]: what is valid of the tokens beside the video."""
    text = torch.arange(EXTRA) < torch.tensor(VALID)[:, None]
    video_part = torch.ones(2, LENGTH, dtype=torch.bool)
    parts = [text, video_part] if text_first else [video_part, text]
    return torch.cat(parts, 1)[:, None, None]


def padded_module(mask: Tensor | None, **attributes: Any) -> tuple[Any, Tensor]:
    module = made(VideoAttention)
    module.options = {"attn_mask": mask}
    x = video(2, LENGTH + EXTRA)
    return mtsa.sparsify(module, config("*", **attributes)), x


def expected_of(module: Any, x: Tensor, top_k: int, **more: Any) -> Tensor:
    heads = [
        project(x).unflatten(2, (2, -1)).transpose(1, 2)
        for project in (module.to_q, module.to_k, module.to_v)
    ]
    call = AttentionCall(*heads)
    return defined(call, GRID, (4, 4, 4), top_k, valid=VALID, **more).transpose(1, 2).flatten(2)


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("form", ["bool", "bias", "heads"])
def test_key_padding_becomes_lengths(form: str, text_first: bool) -> None:
    mask = padding(text_first)
    if form == "bias":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if form == "heads":
        mask = mask.expand(-1, 2, -1, -1)
    module, x = padded_module(mask, ratio=0.25)
    with mtsa.video_shape(module, GRID, text_length=EXTRA, text_first=text_first):
        out = module(x)
    expected = expected_of(module, x, 2, text_first=text_first)
    seen = padding(text_first)[:, 0, 0]
    assert error(out[seen], expected[seen]) < 1e-5
    assert module._sparse_attention.sparse_calls == 1


def _hole(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[0, ..., LENGTH] = False
    return mask


def _hidden_video(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[1, ..., 3] = False
    return mask


def _one_head(mask: Tensor) -> Tensor:
    mask = mask.repeat(1, 2, 1, 1)
    mask[0, 1, 0, -1] = False
    return mask


UNSUPPORTED = {
    "square": lambda: torch.ones(LENGTH + EXTRA, LENGTH + EXTRA).tril().bool(),
    "hole": lambda: _hole(padding()),
    "video": lambda: _hidden_video(padding()),
    "bias": lambda: torch.randn(2, 1, 1, LENGTH + EXTRA),
    "heads that differ": lambda: _one_head(padding()),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_any_other_mask_raises(kind: str) -> None:
    module, x = padded_module(UNSUPPORTED[kind]())
    with (
        pytest.raises(ValueError, match=r"cannot serve this call: attn_mask .*on_unsupported"),
        mtsa.video_shape(module, GRID, text_length=EXTRA),
    ):
        module(x)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_any_other_mask_runs_dense_on_request_and_warns_once(kind: str) -> None:
    module, x = padded_module(UNSUPPORTED[kind](), on_unsupported="dense")
    expected = VideoAttention.forward(module, x)
    with mtsa.video_shape(module, GRID, text_length=EXTRA):
        with pytest.warns(UserWarning, match="runs dense: it attn_mask"):
            assert torch.equal(module(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(x)
    state = module._sparse_attention
    assert state.sparse_calls == 0 and list(state.dense_calls.values()) == [2]


def test_a_mask_is_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = VideoTokens(GRID, EXTRA)
    mask, read = padding(), []
    operator = torch.ops.video_attn.valid_text

    class Counting:
        @staticmethod
        def valid_text(*arguments: Any) -> Tensor:
            read.append(True)
            return operator(*arguments)

    monkeypatch.setattr(torch.ops, "video_attn", Counting)
    first = valid_text(mask, tokens)
    assert valid_text(mask, tokens) is first and len(read) == 1
    assert first.tolist() == list(VALID) and first.dtype == torch.int32
    mask[0, ..., -1] = False  # the same tensor with other values
    assert valid_text(mask, tokens).tolist() == [5, 2] and len(read) == 2
    with pytest.raises(UnsupportedError):
        valid_text(mask, VideoTokens(GRID, EXTRA, text_first=True))


@pytest.mark.parametrize("options, words", [
    ({"dropout_p": 0.1}, "asks for dropout_p 0.1"),
    ({"is_causal": True}, "asks for causal attention"),
])  # fmt: skip
def test_what_else_is_refused(options: dict[str, Any], words: str) -> None:
    module = made(VideoAttention)
    module.options = options
    mtsa.sparsify(module, config("*", video_shape=GRID))
    with pytest.raises(ValueError, match=f"cannot serve this call: {words}"):
        module(video())
    mtsa.set_sparse_attention_attribute(module, "*", {"on_unsupported": "dense"})
    with pytest.warns(UserWarning, match=words):
        module(video())


def test_the_scale_is_honoured() -> None:
    module, x = made(VideoAttention), video()
    module.options = {"scale": 0.05}
    dense = module(x)
    mtsa.sparsify(module, config("*", ratio=1.0, video_shape=GRID))
    assert error(module(x), dense) < 1e-5


# -- nn.MultiheadAttention -------------------------------------------------------------------------


def multihead(**options: Any) -> Any:
    return made(lambda: nn.MultiheadAttention(WIDTH, 2, **{"batch_first": True, **options}))


def multihead_defined(module: nn.MultiheadAttention, x: Tensor, top_k: int) -> Tensor:
    parts = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    call = AttentionCall(*(y.unflatten(2, (2, -1)).transpose(1, 2) for y in parts))
    out = defined(call, GRID, (4, 4, 4), top_k).transpose(1, 2).flatten(2)
    return module.out_proj(out)


@pytest.mark.parametrize("options", [
    {}, {"batch_first": False}, {"bias": False}, {"kdim": WIDTH, "vdim": WIDTH},
])  # fmt: skip
@torch.no_grad()
def test_multihead_attention(options: dict[str, Any]) -> None:
    """Every form of it: at ratio 1 its own output, at less that of the definition."""
    module, x = multihead(**options), video()
    if options.get("kdim"):  # the same as one matrix, but kept apart
        module._qkv_same_embed_dim = False
        weights = module.in_proj_weight.chunk(3)
        for name, weight in zip("qkv", weights, strict=True):
            setattr(module, f"{name}_proj_weight", nn.Parameter(weight.clone()))
    given = x if module.batch_first else x.transpose(0, 1)
    dense = module(given, given, given, need_weights=False)[0]
    mtsa.sparsify(module, {"sparse_cfg": {"multiheadattention": vsa(1.0, video_shape=GRID)}})
    out, weights = module(given, given, given, need_weights=False)
    assert weights is None and error(out, dense) < 1e-5
    mtsa.set_sparse_attention_attribute(module, "*", {"top_k_ratio": 0.25})
    out = module(given, given, given, need_weights=False)[0]
    out = out if module.batch_first else out.transpose(0, 1)
    assert error(out, multihead_defined(module, x, 2)) < 1e-5


@torch.no_grad()
def test_multihead_without_a_batch() -> None:
    module, x = mtsa.sparsify(multihead(), config("*", ratio=0.25, video_shape=GRID)), video(1)
    expected = module(x, x, x, need_weights=False)[0][0]
    single = x[0]
    assert torch.equal(module(single, single, single, need_weights=False)[0], expected)


def test_multihead_cross_attention_stays_dense() -> None:
    module, x, y = multihead(), video(), video(seed=5)
    dense = module(x, y, y, need_weights=False)[0]
    mtsa.sparsify(module, config("*", ratio=0.25, video_shape=GRID))
    assert torch.equal(module(x, y, y, need_weights=False)[0], dense)
    assert module._sparse_attention.dense_calls == {"cross-attention": 1}


@pytest.mark.parametrize("options, given, words", [
    ({}, {}, "asks for the attention weights; pass need_weights=False"),
    ({"add_bias_kv": True}, {"need_weights": False}, "adds a key of its own"),
    ({"add_zero_attn": True}, {"need_weights": False}, "adds a key of its own"),
    ({}, {"need_weights": False, "attn_mask": torch.eye(LENGTH).bool()}, "attn_mask has shape"),
    ({}, {"need_weights": False, "key_padding_mask": torch.ones(2, LENGTH).tril(-1).bool()},
     "attn_mask hides tokens of the video"),
], ids=range(5))  # fmt: skip
def test_what_multihead_cannot_do(
    options: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    module, x = multihead(**options), video()
    expected = module(x, x, x, **given)
    mtsa.sparsify(module, config("*", video_shape=GRID))
    with pytest.raises(ValueError, match=f"cannot serve this call: {words}"):
        module(x, x, x, **given)
    mtsa.set_sparse_attention_attribute(module, "*", {"on_unsupported": "dense"})
    with pytest.warns(UserWarning, match=words):
        got = module(x, x, x, **given)
    assert torch.allclose(got[0], expected[0], atol=1e-6)
    assert (got[1] is None) == (expected[1] is None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_multihead_key_padding(dtype: torch.dtype) -> None:
    """As the module takes it: True hides, or what is added."""
    module, x = multihead(), video(2, LENGTH + EXTRA)
    hidden = ~padding()[:, 0, 0]
    mask = (
        hidden if dtype == torch.bool else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    )
    dense = module(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    mtsa.sparsify(module, config("*", ratio=1.0))
    with mtsa.video_shape(module, GRID, text_length=EXTRA):
        out = module(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    assert error(out[~hidden], dense[~hidden]) < 1e-5


@pytest.mark.parametrize("grad", [False, True])
def test_encoder_layers_are_not_left_to_their_fused_kernel(grad: bool) -> None:
    """In evaluation torch would run the whole layer in one kernel, and no attention of ours."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True)
    model = made(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x = video()
    with torch.set_grad_enabled(grad):
        dense = model(x)
        mtsa.sparsify(model, config("*self_attn", ratio=1.0, video_shape=GRID))
        assert error(model(x), dense) < 1e-5
        mtsa.set_sparse_attention_attribute(model, "*", {"top_k_ratio": 0.25})
        assert error(model(x), dense) > 1e-2
        states = [m._sparse_attention for _, m in mtsa.get_named_sparse_attention_modules(model)]
        assert [state.sparse_calls for state in states] == [2, 2]
        mtsa.disable_sparse_attention(model, "*")
        assert torch.equal(model(x), dense)
        mtsa.enable_sparse_attention(model, "*")
        assert error(model(x), dense) > 1e-2
        mtsa.unsparsify(model)
        assert torch.equal(model(x), dense)


def test_nested_tensors_are_refused_with_the_remedy() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True)
    model, x = made(lambda: nn.TransformerEncoder(layer, 1)), video(2, LENGTH + EXTRA)
    mtsa.sparsify(model, config("*"))
    hidden = ~padding()[:, 0, 0]
    with (
        torch.no_grad(),
        mtsa.video_shape(model, GRID, text_length=EXTRA),
        pytest.raises(ValueError, match="enable_nested_tensor=False"),
    ):
        model(x, src_key_padding_mask=hidden)
