"""docs/sparsify.md: its code runs, its table is the command's, its defaults are true."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sparsity_cases import GRID, LENGTH, VideoAttention
from tiny_models import MODELS, output
from torch import Tensor, nn

import video_attn.sparsity as mtsa
from video_attn.sparsity.attributes import METHODS
from video_attn.tools.token_table import count_tokens

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "sparsify.md").read_text(encoding="utf-8")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn1": VideoAttention()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["attn1"](x)
        return x


def test_the_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, around tiny models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fastwan" / "transformer").mkdir(parents=True)
    gates = {f"blocks.{i}.to_gate_compress.weight": torch.zeros(24, 24) for i in range(2)}
    save_file(gates, tmp_path / "fastwan" / "transformer" / "model.safetensors")
    wan, ltx2 = MODELS["wan"], MODELS["ltx2"]
    names: dict[str, Any] = {
        "pipe": SimpleNamespace(transformer=ltx2.model(), scheduler=None),
        "model": Model(),
        "video_latents": torch.randn(1, LENGTH, 32),
        "transformer": wan.model(),
        "fresh_transformer": wan.model(),
        "other_transformer": wan.model(),
    }
    page = re.sub(r"<!-- not run.*?```python.*?```", "", PAGE, flags=re.DOTALL)
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "sparsify.md", "exec"), names)
    assert "2/12 modules enabled" in capsys.readouterr().out
    assert names["out"].isfinite().all() and GRID == (5, 6, 7)
    assert not mtsa.is_attn_sparsified(names["pipe"])
    mtsa.sparsify(names["pipe"], names["vsa_config"])
    output(names["pipe"].transformer, ltx2.inputs(1))
    for name in ("fresh_transformer", "other_transformer"):
        assert mtsa.is_attn_sparsified(names[name])
    assert names["fresh_transformer"].blocks[0].attn1.to_gate_compress.out_features == 24


def test_the_table_of_tokens() -> None:
    rows = re.findall(
        r"^\| (\d+) x (\d+) x (\d+) \| ([\d x]+) \| ([\d,]+) \| (\d+) \(([\d.]+)\) \| (.+?) \|$",
        PAGE, re.MULTILINE,
    )  # fmt: skip
    assert len(rows) == 6
    for height, width, frames, grid, tokens, tiles, fill, rating in rows:
        count = count_tokens("ltx2", int(height), int(width), int(frames))
        assert grid == " x ".join(map(str, count.grid))
        assert (tokens, tiles) == (f"{count.tokens:,}", str(count.tiles))
        assert (fill, rating) == (f"{count.fill:.2f}", count.rating)


def test_every_attribute_is_in_the_table() -> None:
    shown = set(re.findall(r"`(\w+)`", PAGE))
    radial = {"neighbor_fraction", "min_window", "split_width", "sink_frames", "pooling"}
    known = {key for kind in METHODS.values() for key in kind.model_fields} - radial
    assert known <= shown, known - shown
