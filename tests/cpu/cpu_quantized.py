"""Quantized attention in C++ and by definition."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from video_attn import attention
from video_attn.quantize import QUANTIZED_PRECISIONS, QuantizationOptions

PRECISIONS = pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
OPTIONS = [
    QuantizationOptions(smooth_k=False),
    QuantizationOptions(smooth_q=True),
    QuantizationOptions(smooth_v=True),
    QuantizationOptions(hadamard=True),
    QuantizationOptions(smooth_q=True, smooth_v=True, hadamard=True),
]


def run(*inputs: Any, backend: str = "cpu", **options: Any) -> tuple[Tensor, Tensor]:
    return attention(*inputs, backend=backend, return_lse=True, **options)


def both(*inputs: Any, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) of the C++ backend, and by definition."""
    return [run(*inputs, backend=backend, **options) for backend in ("cpu", "reference")]
