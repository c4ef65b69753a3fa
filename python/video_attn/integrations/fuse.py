"""Projecting q, k and v by one matrix, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_FUSED = ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv")


class FusedProjections:
    """diffusers' ``fuse_qkv_projections`` of transformers, undone without a trace.

    Those that were fused before stay so.

    Raises:
        ValueError: weights that cannot be put together as they are: with a LoRA that is not merged,
            offloaded, or stored in a dtype that does not compute. Nothing is changed then.
    """

    def __init__(self, transformers: Sequence[Any]) -> None:
        self.transformers = [x for x in transformers if not _is_fused(x)]
        for transformer in self.transformers:
            if not hasattr(transformer, "fuse_qkv_projections"):
                raise ValueError(
                    f"fuse_qkv must be False for {type(transformer).__name__}: diffusers cannot "
                    "fuse its projections"
                )
            for name, module in transformer.named_modules():
                if name.rpartition(".")[2] in _PARTS:
                    _check(name, module)
        for transformer in self.transformers:
            transformer.fuse_qkv_projections()

    def undo(self) -> None:
        """Separate projections again; diffusers itself would keep the weights twice."""
        for transformer in self.transformers:
            if not _is_fused(transformer):
                continue
            transformer.unfuse_qkv_projections()
            for module in transformer.modules():
                if not getattr(module, "fused_projections", None):
                    continue
                for name in _FUSED:
                    if hasattr(module, name):
                        delattr(module, name)
                module.fused_projections = False


def _is_fused(transformer: Any) -> bool:
    return any(getattr(module, "fused_projections", False) for module in transformer.modules())


def _check(name: str, module: Any) -> None:
    if module is None:
        return
    reason = None
    if hasattr(module, "lora_A") or hasattr(module, "base_layer"):
        reason = "carries a LoRA, which would be lost; call fuse_lora() and unload_lora_weights()"
    else:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or not isinstance(module, torch.nn.Linear):
            reason = f"is a {type(module).__name__}, not a plain linear layer"
        elif weight.device.type == "meta":
            reason = "is offloaded; apply before offloading is enabled"
        elif weight.dtype.itemsize < 2:
            reason = f"is stored as {weight.dtype}"
    if reason is not None:
        raise ValueError(f"fuse_qkv must be False: {name} {reason}")
