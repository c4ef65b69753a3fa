"""The pictures of docs/calibrate.md, from heads of a known kind:

python tools/calibrate_pictures.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from known_heads import known_head, smooth_features

from video_attn import cli
from video_attn.tools.capture import Capture, Facts
from video_attn.tools.capture.files import file_name, save_capture

GRID, TILE, DIM, LAYERS = (12, 16, 16), "2x4x4", 32, 4
HEADS = ["local"] * 3 + ["local in space", "local in time", "local in time", "by content", "global"]
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
EXPLAINED = ("0", "1")  # a layer and a head that is local


def save_layers(folder: Path) -> None:
    """Captures of layers whose heads look ever farther."""
    for layer in range(LAYERS):
        kinds = HEADS[layer:] + HEADS[-1:] * layer
        heads = [known_head(kind, GRID, dim=DIM, seed=n + layer) for n, kind in enumerate(kinds)]
        q, k = (torch.cat([head[x] for head in heads], 1) for x in range(2))
        v = torch.cat([
            smooth_features(GRID, DIM, seed=n)[None, None] for n in range(len(heads))
        ], 1)  # fmt: skip
        facts = Facts(kernel="sdpa", call_idx=layer, layer=layer, step=0, grid=GRID, text_length=0,
                      text_first=False)  # fmt: skip
        save_capture(Capture(q, k, v, facts), folder / file_name("sdpa", layer, "safetensors"))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        save_layers(Path(folder))
        return cli.main([
            "calibrate", "--captured", folder, "--objective", "density", "--budget", "0.1",
            "--sta-tile", TILE, "--vsa-tile", TILE, "--block-size", "32", "--device", "cpu",
            "--output", str(Path(folder) / "schedule.json"),
            "--plot", str(IMAGES / "calibrate.png"), "--explain", *EXPLAINED,
            "--explain-plot", str(IMAGES / "calibrate_head.png"),
        ])  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
