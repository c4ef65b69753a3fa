"""Formulas for ``torch.utils.flop_counter``: 4 * D per attended pair, 2.5 times that backward."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .block_mask import BlockMask
from .mask_arguments import MaskArguments

_BACKWARD = 2.5  # five products where the forward pass has two
_FIELDS = len(MaskArguments._fields)


def _flops(q: Tensor, k: Tensor, v: Tensor, mask: MaskArguments, is_causal: bool) -> int:
    batch, heads, q_len, head_dim = q.shape
    per_pair = 2 * (head_dim + v.shape[3])
    built = BlockMask.from_arguments(mask, q_len, k.shape[2])
    if built is None:
        pairs = q_len * k.shape[2]
        if is_causal:  # query i sees the keys up to i + Sk - Sq
            last = k.shape[2] - q_len
            pairs = sum(max(0, min(k.shape[2], i + last + 1)) for i in range(q_len))
        return batch * heads * pairs * per_pair
    if type(q) is not Tensor or q.device.type == "meta":
        # There are no values to count: all entries of all lists, whole blocks.
        entries = built.kv_indices[0, 0].numel() * built.q_block_size * built.kv_block_size
        return batch * heads * entries * per_pair
    counted = built.pairs_per_head()
    pairs = int(counted.sum()) * (batch // counted.shape[0]) * (heads // counted.shape[1])
    return pairs * per_pair


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **_: Any) -> int:
    mask, (_, is_causal, *_rest) = MaskArguments(*arguments[:_FIELDS]), arguments[_FIELDS:]
    return _flops(q, k, v, mask, is_causal)


def _backward(*arguments: Any, **_: Any) -> int:
    _, _, q, k, v, _, _, *rest = arguments
    mask, (_, is_causal, *_rest) = MaskArguments(*rest[:_FIELDS]), rest[_FIELDS:]
    return int(_BACKWARD * _flops(q, k, v, mask, is_causal))


def register() -> None:
    """Makes the formulas known, if somebody has loaded the counter, and to counters that run now.

    Importing the counter here would import Triton into every program.
    """
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    operators = torch.ops.video_attn
    formulas = {operators.attention_forward: _forward, operators.attention_backward: _backward}
    registries = [counting.flop_registry]
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, counting.FlopCounterMode):
            registries.append(counter.flop_registry)
    for registry in registries:
        for operator, formula in formulas.items():
            if operator not in registry:
                formula._get_raw = True  # type: ignore[attr-defined]
                registry[operator] = formula
