"""video-attn tokens: exact grids, tokens and tiles."""

from __future__ import annotations

import pytest

from video_attn import cli
from video_attn.tools.token_table import MODELS, count_tokens

# height, width, frames, grid, tokens, tiles, fill
LTX2 = [
    (512, 768, 121, (16, 16, 24), 6144, 96, 1.0, "excellent for VSA"),
    (384, 384, 49, (7, 12, 12), 1008, 18, 0.875, "marginal"),
    (256, 256, 25, (4, 8, 8), 256, 4, 1.0, "too small"),
    (896, 1536, 121, (16, 28, 48), 21504, 336, 1.0, "excellent for VSA"),
    (768, 1280, 121, (16, 24, 40), 15360, 240, 1.0, "excellent for VSA"),
    (1088, 1920, 121, (16, 34, 60), 32640, 540, 0.944, "excellent for VSA"),
]


@pytest.mark.parametrize("row", LTX2, ids=lambda row: "x".join(map(str, row[:3])))
def test_ltx2(row: tuple) -> None:
    height, width, frames, grid, tokens, tiles, fill, rating = row
    count = count_tokens("ltx2", height, width, frames)
    assert (count.grid, count.tokens, count.tiles, count.rating) == (grid, tokens, tiles, rating)
    assert round(count.fill, 3) == fill and count.kept == -(-tiles // 2)


@pytest.mark.parametrize("model, size, grid, text", [
    ("ltx", (512, 704, 161), (21, 16, 22), 0),
    ("wan", (720, 1280, 81), (21, 45, 80), 0),
    ("wan", (480, 832, 81), (21, 30, 52), 0),
    ("wan2.2-5b", (704, 1280, 121), (31, 22, 40), 0),
    ("hunyuan", (720, 1280, 129), (33, 45, 80), 256),
    ("cogvideox", (480, 720, 49), (13, 30, 45), 226),
    ("cogvideox1.5", (768, 1360, 81), (11, 48, 85), 226),
    ("mochi", (480, 848, 163), (28, 30, 53), 256),
])  # fmt: skip
def test_other_models(model: str, size: tuple, grid: tuple, text: int) -> None:
    count = count_tokens(model, *size)
    assert (count.grid, count.text) == (grid, text)
    assert set(MODELS) == {
        "ltx2", "ltx", "wan", "wan2.2-5b", "hunyuan", "cogvideox", "cogvideox1.5", "mochi",
    }  # fmt: skip


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "tokens",
        "--model",
        "ltx2",
        "--height",
        "512",
        "384",
        "--width",
        "768",
        "384",
        "--frames",
        "121",
        "49",
    ]
    assert cli.main([*words, "--top-k-ratio", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["video", "grid", "tokens", "tiles", "fill", "kept"]
    assert lines[1].split() == [
        "512x768x121", "16x16x24", "6,144", "96", "1.00", "29", "excellent", "for", "VSA",
    ]  # fmt: skip
    assert lines[2].split()[:6] == ["384x384x49", "7x12x12", "1,008", "18", "0.88", "6"]


@pytest.mark.parametrize("words, said", [
    (["--frames", "120"], "--frames must be a multiple of 8, plus 1, for ltx2: 113 or 121"),
    (["--height", "500"], "--height must be a multiple of 32 for ltx2, got 500"),
    (["--width", "64", "96", "--height", "64", "96", "64"], "--width has 2 values, others have 3"),
])  # fmt: skip
def test_sizes_that_a_model_does_not_make(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tokens", *words]) == 2
    assert said in capsys.readouterr().err
