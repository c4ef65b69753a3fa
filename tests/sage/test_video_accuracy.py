"""What smoothing and rotation are for: data as video models have it (table: docs/sage_notes.md).

python tests/sage/test_video_accuracy.py        # prints the table
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from torch import Tensor
from video_features import video_qkv

from video_attn import attention
from video_attn.quantize import QUANTIZED_PRECISIONS, parse_recipe

DATA = {"plain": (0.0, 0), "biased keys": (8.0, 0), "both": (8.0, 4)}  # bias, outlier channels
OPTIONS = (
    "", "granularity=per_thread", "smooth_k=False", "smooth_q=True", "hadamard=True",
    "hadamard=True,smooth_q=True,smooth_v=True",
)  # fmt: skip


class Figures(NamedTuple):
    relative: float  # L2 error over the norm of exact attention
    cosine: float
    worst_row: float  # the largest relative error of a row

    @classmethod
    def of(cls, got: Tensor, exact: Tensor) -> Figures:
        got, exact = got.double(), exact.double()
        error, norm = (got - exact).norm(dim=-1), exact.norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), 0)
        return cls(
            float((got - exact).norm() / exact.norm()), float(cosine), float((error / norm).max())
        )


def measure(data: str, recipe: str) -> Figures:
    q, k, v, scale = video_qkv(*DATA[data])
    exact = attention(q.double(), k.double(), v.double(), scale=scale, backend="reference")
    if recipe == "bf16":
        return Figures.of(attention(*(x.bfloat16() for x in (q, k, v)), scale=scale), exact)
    precision, options = parse_recipe(recipe)
    out = attention(
        q, k, v, scale=scale, precision=precision, quantization=options, backend="reference"
    )
    return Figures.of(out, exact)


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_biased_keys_with_large_channels(precision):
    """Smoothed keys lose nothing to a bias; rotation makes up for large channels."""
    plain, biased, both = (measure(data, precision).relative for data in DATA)
    assert plain < {"sage_fp16": 0.012, "sage_fp8": 0.016, "fp8": 0.04}[precision]
    assert biased < 1.05 * plain
    assert measure("biased keys", f"{precision}:smooth_k=False").relative > 1.8 * biased
    assert measure("both", f"{precision}:hadamard=True").relative < 0.85 * both


def main() -> None:
    print("| recipe | " + " | ".join(DATA) + " |\n|---|" + "---|" * len(DATA))
    recipes = ["bf16", *(f"{p}:{o}".rstrip(":") for p in QUANTIZED_PRECISIONS for o in OPTIONS)]
    for recipe in recipes:
        cells = [measure(data, recipe) for data in DATA]
        text = [f"{f.relative:.4f}, {1 - f.cosine:.0e}, {f.worst_row:.3f}" for f in cells]
        print(f"| `{recipe}` | " + " | ".join(text) + " |", flush=True)


if __name__ == "__main__":
    main()
