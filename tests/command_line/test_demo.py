"""The demo: clips, tokens, weights, and the whole command on a tiny clip."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from video_attn import VideoLayout, cli
from video_attn.patterns.sliding_tile import sliding_tile_mask
from video_attn.tools import UsageError, video
from video_attn.tools.demo import command as demo
from video_attn.tools.demo import report, tokens
from video_attn.tools.demo.measure import compare
from video_attn.tools.demo.patterns import (
    PATTERNS,
    Call,
    Settings,
    block_weights,
    kept_weight,
)
from video_attn.tools.plot import style

pytestmark = pytest.mark.usefixtures("on_quick_backend")


def small_clip(frames: int = 4, height: int = 32, width: int = 48) -> video.Clip:
    return video.pan_and_zoom(video.photograph(), frames, (height, width))


def small_tokens() -> tokens.Tokens:
    return tokens.tokens_of(small_clip(), torch.device("cpu"), torch.float32)  # grid 4 x 4 x 6


# -- clips ----------------------------------------------------------------------------------------


def test_pan_and_zoom_moves_a_little() -> None:
    clip = small_clip(frames=8)
    assert clip.shape == (8, 32, 48, 3)
    assert clip.dtype == np.uint8
    steps = np.abs(np.diff(clip.astype(int), axis=0)).mean((1, 2, 3))
    across = np.abs(clip[0].astype(int) - clip[-1]).mean()
    assert (steps > 0.5).all()
    assert steps.max() < across


def test_photographs(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 30), (10, 200, 30, 255)).save(tmp_path / "green.png")
    clip = video.pan_and_zoom(video.photograph(tmp_path / "green.png"), 2, (16, 16))
    assert (clip == np.array([10, 200, 30])).all()
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"no\.png"):
        video.photograph(tmp_path / "no.png")
    with pytest.raises(UsageError, match=r"absent\.png cannot be read as an image"):
        video.photograph(tmp_path / "absent.png")


def test_clips_survive_a_file(tmp_path: Path) -> None:
    clip = small_clip(frames=6, height=64, width=96)
    video.write_clip(tmp_path / "clip.mp4", clip, fps=12)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 12
    again = video.read_clip(tmp_path / "clip.mp4", 6, (64, 96), seconds=10)
    assert np.abs(again.astype(int) - clip).mean() < 8  # H.264 at high quality
    firsts = video.read_clip(tmp_path / "clip.mp4", 2, (32, 32), seconds=0.25)  # frames 0 to 2
    assert firsts.shape == (2, 32, 32, 3)
    odd = small_clip(frames=2, height=33, width=47)
    video.write_clip(tmp_path / "odd.mp4", odd, fps=2.5)
    assert video.read_clip(tmp_path / "odd.mp4", 2, (32, 46), seconds=9).shape == (2, 32, 46, 3)


def test_only_the_asked_seconds_are_read(tmp_path: Path) -> None:
    """Black frames for a second, white ones after: the first second is all black."""
    clip = np.zeros((16, 32, 32, 3), np.uint8)
    clip[8:] = 255
    video.write_clip(tmp_path / "clip.mp4", clip, fps=8)
    assert video.read_clip(tmp_path / "clip.mp4", 8, (32, 32), seconds=1).max() < 30
    spread = video.read_clip(tmp_path / "clip.mp4", 4, (32, 32), seconds=2).mean((1, 2, 3))
    assert ((spread > 128) == [False, False, True, True]).all()


def test_what_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "no.mp4").write_text("no video")
    with pytest.raises(UsageError, match=r"no\.mp4 cannot be read"):
        video.read_clip(tmp_path / "no.mp4", 2, (16, 16), 1)
    with pytest.raises(UsageError, match=r"absent\.mp4 cannot be read"):
        video.read_clip(tmp_path / "absent.mp4", 2, (16, 16), 1)
    video.write_clip(tmp_path / "short.mp4", small_clip(frames=2), fps=2)
    with pytest.raises(UsageError, match="have 2 frames, and --frames asks for 3"):
        video.read_clip(tmp_path / "short.mp4", 3, (16, 16), 1)


# -- tokens ---------------------------------------------------------------------------------------


def test_values_are_the_pictures() -> None:
    clip = small_clip()
    there = tokens.tokens_of(clip, torch.device("cpu"), torch.float32)
    assert there.grid == (4, 4, 6)
    assert there.q.shape == there.k.shape == there.v.shape == (1, 3, 96, 64)
    assert (tokens.clip_of(there.v, there) == clip).all()
    assert there.v.mean((2, 3)).abs().max() < 1e-5
    # The token of frame 1, row 2, column 3, colour 2 holds its patch.
    patch = clip[1, 16:24, 24:32, 2].astype(np.float32).flatten() / 127.5 - 1
    value = there.v[0, 2, (1 * 4 + 2) * 6 + 3] + there.mean[0, 2, 0]
    assert np.abs(value.numpy() - patch).max() < 1e-5


def test_positions_are_relative() -> None:
    """One descriptor everywhere: scores depend on distances of places alone, and fall with them."""
    grid = (4, 5, 6)
    same = torch.randn(64, generator=torch.Generator().manual_seed(1)).expand(1, 1, 120, 64)
    turned = tokens._rotated(same, grid)[0, 0].double()
    assert torch.allclose(turned.norm(dim=1), same[0, 0].double().norm(dim=1))
    scores = (turned @ turned.T).view(*grid, *grid)
    assert scores[1, 1, 1, 2, 3, 2].item() == pytest.approx(scores[2, 2, 3, 3, 4, 4].item())
    at_home = scores[2, 2, 2, 2, 2, 2]
    for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert scores[2, 2, 2][tuple(2 + s for s in step)] < at_home


def test_tokens_repeat() -> None:
    """The projection is seeded: two runs give the same tokens, whatever the global generator."""
    first = small_tokens()
    torch.manual_seed(99)
    second = small_tokens()
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(2, 2, 3), (3, 3, 4)], ids=["even", "ragged"])
def test_block_weights_are_the_softmax(tile: tuple[int, int, int]) -> None:
    some = small_tokens()
    some = some._replace(q=some.q * 0.1)  # flat enough for padding to matter, if it were seen
    layout = VideoLayout(some.grid, tile)
    mask = sliding_tile_mask(layout, (1, 1, 2))
    call = Call(lambda: some.v, mask, layout.to_tiles, layout.from_tiles)
    weights = block_weights(some, call)
    order, lens = layout.tile_order(), layout.block_lens().tolist()
    q, k = some.q[0][:, order].double(), some.k[0][:, order].double()
    softmax = (q @ k.mT / 8).softmax(-1)
    rows = [block.mean(1) for block in softmax.split(lens, 1)]
    expected = torch.stack(
        [torch.stack([c.sum(-1) for c in r.split(lens, -1)], -1) for r in rows], 1
    )
    assert torch.allclose(weights.double(), expected, atol=1e-5)
    tokens_seen = mask.to_token_mask()[0][:, layout.padded_slots()][..., layout.padded_slots()]
    kept = float((softmax * tokens_seen).sum(-1).mean())
    assert kept_weight(weights, mask) == pytest.approx(kept, abs=1e-5)
    assert 0.05 < kept < 0.95


def test_block_weights_need_a_mask() -> None:
    some = small_tokens()
    with pytest.raises(ValueError, match="mask"):
        block_weights(some, Call(lambda: some.v))


# -- patterns -------------------------------------------------------------------------------------


def results(settings: Settings) -> dict[str, Any]:
    outcome = compare(small_tokens(), settings, 1, lambda done, total, what: None)
    return {measured.name: measured for measured in outcome.patterns}


def test_patterns_that_keep_everything_are_dense() -> None:
    found = results(Settings((2, 2, 3), (2, 2, 2), 1.0))
    assert set(found) == set(PATTERNS)
    for name in ("torch", "dense", "sta", "vsa"):  # radial windows are no option of the demo
        result = found[name]
        assert result.density == pytest.approx(1)
        assert result.kept_weight == pytest.approx(1, abs=1e-5)
        assert result.error < 1e-5
        assert len(result.timing.samples) == 1


def test_less_kept_is_more_wrong() -> None:
    """Errors and kept weight of sparse patterns lie where they should, and follow density."""
    little = results(Settings((2, 2, 2), (1, 1, 1), 1 / 12))
    more = results(Settings((2, 2, 2), (2, 2, 3), 0.5))
    for name in ("sta", "vsa"):
        assert little[name].density == pytest.approx(1 / 12)
        assert more[name].density == pytest.approx({"sta": 1, "vsa": 0.5}[name])
        assert 0.02 < little[name].error < 1
        assert more[name].error < little[name].error
        assert little[name].kept_weight < more[name].kept_weight
        # Real locality: the kept blocks hold far more than their share.
        assert little[name].kept_weight > 2 * little[name].density


def test_progress_is_told() -> None:
    told: list[tuple[int, int, str]] = []
    compare(small_tokens(), Settings((2, 2, 2), (1, 1, 1), 0.5), 2, lambda *now: told.append(now))
    last = len(told) - 1
    assert [now[:2] for now in told] == [(step, last) for step in range(len(told))]
    for pattern in PATTERNS.values():
        assert sum(now[2].endswith(pattern.title) for now in told) >= 3


# -- the command ----------------------------------------------------------------------------------

TINY = ["--frames", "4", "--size", "32x48", "--tile", "2x2x3", "--window", "1x1x2",
        "--repeats", "2", "--device", "cpu"]  # fmt: skip


def test_the_command_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "out"
    assert cli.main(["demo", *TINY, "--out", str(folder)]) == 0
    text = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "attention_maps.png", "clip.mp4", "comparison.mp4", "results.json",
    ]  # fmt: skip
    record = json.loads((folder / "results.json").read_text())
    assert record["machine"]
    rows = {row["problem"]["pattern"]: row for row in record["results"]}
    assert list(rows) == list(PATTERNS)
    for name, row in rows.items():
        assert PATTERNS[name].title in text
        assert f"{row['metrics']['density']:.1%}" in text
        assert row["samples"] == 2
        assert row["median_ms"] > 0
        assert row["problem"]["grid"] == [4, 4, 6]
    errors = {name: row["metrics"]["relative_error"] for name, row in rows.items()}
    assert errors["torch"] == 0
    assert errors["dense"] < 1e-5
    assert 1e-3 < errors["sta"] < 1
    assert 1e-3 < errors["vsa"] < 1
    assert f"{errors['sta']:.1%}" in text
    assert rows["torch"]["metrics"]["speed_up"] == 1
    assert rows["sta"]["metrics"]["density"] == pytest.approx(2 / 8)
    assert rows["vsa"]["metrics"]["density"] == pytest.approx(1 / 8)
    assert "asked for by use_backend()" in text
    with av.open(str(folder / "comparison.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 4
    panels = len(PATTERNS)  # the clip instead of our dense, which looks like torch's
    assert frames[0].shape[1] == panels * 48 + (panels - 1) * 8
    with Image.open(folder / "attention_maps.png") as picture:
        assert picture.width > 3 * 300


def test_the_maps_show_what_is_kept() -> None:
    """White in a map is what the pattern skips: 6 of 8 blocks per row for STA, 7 for VSA."""
    some = small_tokens()
    outcome = compare(some, Settings((2, 2, 3), (1, 1, 2), 1 / 8), 1, lambda *now: None)
    drawing = report.draw_maps(some, outcome)
    frame = style.pixels(drawing.figure)
    for axes, name, seen in zip(drawing.maps, ("dense", "sta", "vsa"), (8, 2, 1), strict=False):
        places = axes.transData.transform(np.stack(np.indices((8, 8)), -1).reshape(-1, 2))
        columns, rows = places.astype(int).T
        pixels = frame[frame.shape[0] - 1 - rows, columns]
        white = (pixels == 255).all(-1).reshape(8, 8).T  # [query block, key block]
        result = next(r for r in outcome.patterns if r.name == name)
        kept = np.ones((8, 8), bool) if result.kept is None else result.kept[0].numpy()
        assert (white == ~kept).all()
        assert (kept.sum(1) == seen).all()
        assert kept.diagonal().all()


def test_the_command_takes_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (4, 4, 6, 3)).astype(np.uint8)
    clip = clip.repeat(8, 1).repeat(8, 2)
    video.write_clip(tmp_path / "in.mp4", clip, fps=4)
    words = ["--video", str(tmp_path / "in.mp4"), "--out", str(tmp_path / "out"), "--videos"]
    assert cli.main(["demo", *TINY, *words]) == 0
    assert "in.mp4" in capsys.readouterr().out
    again = video.read_clip(tmp_path / "out" / "clip.mp4", 4, (32, 48), seconds=9)
    assert np.abs(again.astype(int) - clip).mean() < 20
    videos = {path.stem.partition("_")[2] for path in (tmp_path / "out").glob("demo-clip_*.mp4")}
    assert videos == set(PATTERNS)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--size", "60x64"], "multiples of 8"),
        (["--video", "absent.mp4"], "absent.mp4"),
        (["--video", "a.mp4", "--image", "b.png"], "not allowed with"),
        (["--tile", "2x2"], "TxHxW"),
    ],
    ids=["size", "no video", "two sources", "tile"],
)
def test_impossible_demos(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["demo", "--device", "cpu", "--out", str(tmp_path / "out"), *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    assert named in capsys.readouterr().err


def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "video-attn info" in capsys.readouterr().err


def test_default_sizes_make_whole_tiles() -> None:
    """The defaults are those of the issue: 8,000 to 16,000 tokens, 10 to 15 % on a CPU."""
    cpu = demo.SCALES["cpu"]
    grid = (cpu.frames, cpu.size[0] // 8, cpu.size[1] // 8)
    assert 8_000 <= math.prod(grid) <= 16_384
    for scale in demo.SCALES.values():
        assert all(side % 8 == 0 for side in scale.size)
        sides = (scale.frames, scale.size[0] // 8, scale.size[1] // 8)
        assert not VideoLayout(sides, scale.tile).is_ragged
    layout = VideoLayout(grid, cpu.tile)
    assert 0.10 <= sliding_tile_mask(layout, (3, 3, 3)).density() <= 0.15
