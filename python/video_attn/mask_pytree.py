"""BlockMask for torch's trees (compile, export, vmap) and for ``torch.load`` of saved masks."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from .block_mask import BlockMask, unchecked_mask

_TENSORS = ("kv_num_blocks", "kv_indices", "q_block_lens", "kv_block_lens")
_SIZES = ("q_block_size", "kv_block_size", "q_len", "kv_len")


def _flatten(mask: BlockMask) -> tuple[list[Any], tuple[Any, ...]]:
    """For torch's trees: the tensors that are there; which they are, and the sizes."""
    names = [name for name in _TENSORS if getattr(mask, name) is not None]
    sizes = [getattr(mask, name) for name in _SIZES]
    return [getattr(mask, name) for name in names], (tuple(names), tuple(sizes))


def _flatten_with_keys(mask: BlockMask) -> tuple[list[Any], tuple[Any, ...]]:
    leaves, context = _flatten(mask)
    return [(pytree.GetAttrKey(n), x) for n, x in zip(context[0], leaves, strict=True)], context


def _unflatten(leaves: Any, context: Any) -> BlockMask:
    """Unchecked: the leaves of a tree may be anything."""
    names, sizes = context
    named = dict.fromkeys(_TENSORS) | dict(zip(names, leaves, strict=True))
    fields = named | dict(zip(_SIZES, sizes, strict=True))
    return unchecked_mask(
        **fields, _transpose=None, _transposed_versions=None, _transpose_is_derived=False
    )


pytree.register_pytree_node(
    BlockMask,
    _flatten,
    _unflatten,
    serialized_type_name="video_attn.BlockMask",
    to_dumpable_context=lambda context: [list(part) for part in context],
    from_dumpable_context=lambda context: tuple(tuple(part) for part in context),
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([BlockMask])  # for torch.load of a saved mask
