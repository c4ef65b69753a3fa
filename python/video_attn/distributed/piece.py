"""A piece of attention on one rank: its options, and its gradients from final results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import attention
from ..block_mask import BlockMask, mask_arguments
from ..quantize import QuantizationOptions


@dataclass(frozen=True)
class Options:
    """How a piece of attention is computed: the arguments of :func:`video_attn.attention`."""

    scale: float
    precision: str = "native"
    backend: str | None = None
    deterministic: bool = False
    quantization: QuantizationOptions | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of these keys."""
        return attention(
            q, k, v, mask, scale=self.scale, precision=self.precision, backend=self.backend,
            quantization=self.quantization, is_causal=is_causal, return_lse=True,
        )  # fmt: skip

    def gradients(
        self,
        grads: tuple[Tensor, Tensor | None],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        results: tuple[Tensor, Tensor],
        mask: BlockMask | None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of these keys, from the final out and lse of the rows."""
        lists = mask_arguments(mask, transposed=True)
        return torch.ops.video_attn.attention_backward(
            *grads, q, k, v, *results, *lists, self.scale, is_causal, self.deterministic,
            self.backend,
        )  # fmt: skip
