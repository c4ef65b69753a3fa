"""Attention by radial masks, and radial(): order, text, scenes, gradients, wrong arguments."""

from __future__ import annotations

import pytest
import torch
from oracle import Case, check_against_oracle
from oracle import Result as Answer
from radial_cases import blocks_of, layout_of, ours, rule_of
from radial_oracle import Definition, block_mask

from video_attn import Scenes, VideoLayout, attention, radial
from video_attn.patterns.radial import (
    RadialRule,
    radial_mask,
)


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_over_the_mask(text_first: bool, dtype: torch.dtype) -> None:
    """Text before the video needs no permuted copy: the mask says where the frames start."""
    definition = Definition(6, 21, 8, 13, text_first, split=0, decay=0.2, min_window=2)
    mask = ours(definition)
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 2, 3, definition.length, 16, generator=generator).to(dtype)
    out, lse = attention(q, k, v, mask, return_lse=True)
    blocks = block_mask(definition)
    tokens = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    tokens = tokens[: definition.length, : definition.length]
    check_against_oracle(Answer(out, lse), Case(q, k, v, tokens[None, None]), "radial")
    assert 0 < mask.density() < 1


@pytest.mark.parametrize("order", ["bhsd", "bshd"])
@pytest.mark.parametrize("text_length", [None, 5, (0, 13), torch.tensor([13, 7])], ids=str)
def test_radial_of_q_k_v(order: str, text_length: object) -> None:
    """Raster order in and out, text of another length per batch item, what is past it is NaN."""
    definition = Definition(6, 21, 8, 13, split=0, decay=0.2, min_window=2)
    generator = torch.Generator().manual_seed(6)
    q, k, v, grad = torch.randn(4, 2, 2, definition.length, 16, generator=generator)
    blocks = block_mask(definition)
    tokens = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    tokens = tokens[: definition.length, : definition.length].expand(2, 1, -1, -1).clone()
    lengths = [13, 13] if text_length is None else torch.as_tensor(text_length).tolist()
    lengths = [lengths] * 2 if isinstance(lengths, int) else lengths
    given = [q.clone(), k.clone(), v.clone()]
    for item, length in enumerate(lengths):
        past = slice(6 * 21 + length, None)
        tokens[item, :, past] = False
        tokens[item, :, :, past] = False
        grad[item, :, past] = 0
        for x in given:
            x[item, :, past] = torch.nan
    case = Case(q, k, v, tokens, grad_out=grad)
    inputs = [x.transpose(1, 2) if order == "bshd" else x for x in given]
    inputs = [x.detach().requires_grad_() for x in inputs]
    options = {"rule": rule_of(definition), "block_size": 8, "text_length": text_length}
    out = radial(*inputs, (6, 3, 7), layout=order, **options)
    grads = torch.autograd.grad(out, inputs, grad.transpose(1, 2) if order == "bshd" else grad)
    results = [x.transpose(1, 2) if order == "bshd" else x for x in (out.detach(), *grads)]
    check_against_oracle(Answer(results[0], None, *results[1:]), case, "radial")


def test_text_before_the_video_first_and_scenes() -> None:
    """The options of radial() reach the mask."""
    layout = VideoLayout((6, 3, 7), (1, 1, 1), 13, text_first=True)
    q, k, v = torch.randn(3, 1, 2, 139, 16, generator=torch.Generator().manual_seed(1))
    rule = RadialRule(split_width=0, min_window=2)
    scenes = Scenes([0, 2, 6], [[True, False], [True, True]], unit="latent")
    mask = radial_mask(layout, rule, block_size=8, scenes=scenes)
    out = radial(q, k, v, "6x3x7", rule=rule, block_size=8, scenes=scenes, text_first=True)
    assert torch.equal(out, attention(q, k, v, mask))
    assert not torch.equal(out, radial(q, k, v, (6, 3, 7), rule=rule, block_size=8))


@pytest.mark.parametrize("change, error, words", [
    ({"grid": (6, 3)}, ValueError, "grid must be three integers"),
    ({"grid": (7, 3, 7)}, ValueError, "has 147 tokens, but q has only 139"),
    ({"text_length": 14}, ValueError, "text_length must be 0 to 13"),
    ({"text_length": (1, 2, 3)}, ValueError, "one per batch item"),
    ({"text_length": 5, "text_first": True}, ValueError, "must be all 13 text tokens when"),
    ({"text_first": 1}, TypeError, "text_first"),
    ({"rule": {}}, TypeError, "rule must be a RadialRule, got dict"),
    ({"block_size": None}, TypeError, "block_size must be an int"),
    ({"layout": "sbhd"}, ValueError, "layout"),
    ({"window": 3}, TypeError, "window"),
])  # fmt: skip
def test_wrong_arguments_of_radial_are_refused(
    change: dict, error: type[Exception], words: str
) -> None:
    q = torch.zeros(1, 2, 139, 16)
    with pytest.raises(error, match=words):
        radial(q, q, q, **({"grid": (6, 3, 7)} | change))


def test_gradients_reach_a_frame_pair_only_through_kept_blocks() -> None:
    definition = Definition(4, 16, 8, split=0, decay=0.1, min_window=1)
    layout, rule = layout_of(definition), rule_of(definition)
    mask = radial_mask(layout, rule, block_size=8, transposed=True)
    assert mask._transpose is not None
    q, k, v = torch.randn(3, 1, 1, 64, 8, generator=torch.Generator().manual_seed(2))
    k.requires_grad_()
    attention(q, k, v, mask)[0, 0, :8].sum().backward()
    seen = blocks_of(mask)[0].repeat_interleave(8)
    assert not seen.all()
    assert (k.grad[0, 0].abs().sum(-1) > 0).equal(seen)
    plain = ours(definition).transposed()
    assert all(torch.equal(a, b) for a, b in zip(mask.transposed(), plain, strict=True))
