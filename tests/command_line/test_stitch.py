"""`video-attn stitch`: videos found and fitted, labels, differences, files that are no videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from video_attn import cli
from video_attn.tools.stitch.grid import columns_for
from video_attn.tools.stitch.sources import label_of
from video_attn.tools.video import Clip, write_clip

GREY = (128, 128, 128)
RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def flat(colours: Sequence[tuple[int, int, int]], size: tuple[int, int] = (64, 80)) -> Clip:
    """A clip whose frames have one colour each."""
    return np.stack([np.full((*size, 3), colour, np.uint8) for colour in colours])


def save(folder: Path, label: str, clip: Clip, fps: float = 8) -> None:
    write_clip(folder / f"cogvideox-2b_{label}.mp4", clip, fps)


def frames_of(path: Path) -> tuple[Clip, float]:
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]), rate


def near(image: Clip, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(image.astype(int) - colour).max() < 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, "sdpa", flat([GREY] * 4))
    save(tmp_path, "fav3_fp8", flat([RED] * 4))
    save(tmp_path, "sagev1", flat([GREEN] * 4))
    return tmp_path


def test_grid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three videos by name, side by side, each with its label, and as fast as before."""
    monkeypatch.chdir(folder)
    assert cli.main(["stitch", "--input_dir", ".", "--font_size", "12"]) == 0
    grid, rate = frames_of(folder / "comparison_grid.mp4")
    assert grid.shape == (4, 64, 240, 3) and rate == 8
    for n, colour in enumerate((RED, GREEN, GREY)):  # fav3_fp8, sagev1, sdpa
        cell = grid[:, :, 80 * n : 80 * n + 80]
        assert near(cell[:, 50:], colour)
        assert not near(cell[:, 15:40, 15:60], colour)  # the label
        assert cell[:, 15:40, 15:60].max() > 220


def test_a_grid_is_no_part_of_a_grid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the output of the last run nor a grid under another name."""
    words = ["stitch", "--input_dir", str(folder), "--pattern", "*.mp4", "--output"]
    for name in ("all.mp4", "all.mp4", "other.mp4"):
        assert cli.main([*words, str(folder / name)]) == 0
        assert frames_of(folder / name)[0].shape == (4, 64, 240, 3)
    assert "left out: all.mp4" in capsys.readouterr().out


def test_the_output_replaces_no_video(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "cogvideox-2b_sdpa.mp4"
    before = path.read_bytes()
    assert cli.main(["stitch", "--input_dir", str(folder), "--output", str(path)]) == 2
    assert "would replace one of the videos" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_what_does_not_fit_is_fitted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "a", flat([RED, RED, GREEN, GREEN]), fps=4)  # 1 s
    save(tmp_path, "b", flat([BLUE] * 2 + [GREY] * 2, size=(32, 80)), fps=8)  # 0.5 s, flat
    output = tmp_path / "new" / "grid.mp4"
    assert cli.main(["stitch", "--input_dir", str(tmp_path), "--output", str(output)]) == 0
    grid, rate = frames_of(output)
    assert rate == 8 and grid.shape == (8, 64, 160, 3)
    seconds = grid[:, 60:, :80]
    assert [near(image, RED) for image in seconds] == [True] * 4 + [False] * 4
    assert near(seconds[4:], GREEN)
    right = grid[:, :, 140:]  # beside the label
    assert right[:, :14].max() < 16 and right[:, 50:].max() < 16  # black above and below
    assert near(right[:2, 40:46], BLUE) and near(right[2:, 40:46], GREY)  # and stays
    text = capsys.readouterr().out
    assert "b.mp4 is 80 x 32: scaled into 80 x 64" in text
    assert "a.mp4 has 4 frames per second, not 8" in text
    assert "b.mp4 is 0.50 s long: its last frame stays until 1.00 s" in text


def test_fps_keeps_the_speed(folder: Path) -> None:
    output = folder / "grid.mp4"
    words = ["stitch", "--input_dir", str(folder), "--output", str(output), "--fps", "24"]
    assert cli.main(words) == 0
    grid, rate = frames_of(output)
    assert (len(grid), rate) == (12, 24)


def test_order_labels_columns(folder: Path) -> None:
    output = folder / "grid.mp4"
    words = ["stitch", "--input_dir", str(folder), "--output", str(output), "--order", "sdpa",
             "--labels", "torch,FP8,INT8", "--columns", "2", "--font_size", "8"]  # fmt: skip
    assert cli.main(words) == 0
    image = frames_of(output)[0][0]
    assert image.shape == (128, 160, 3)
    assert near(image[50:64, :80], GREY) and near(image[50:64, 80:], RED)
    assert near(image[114:, :80], GREEN) and image[64:, 80:].max() < 16


def test_differences(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row of maps under the videos; the reference's is black."""
    output = folder / "grid.png"
    words = ["stitch", "--input_dir", str(folder), "--output", str(output), "--difference",
             "--order", "sdpa"]  # fmt: skip
    assert cli.main(words) == 0
    from PIL import Image

    image = np.asarray(Image.open(output))
    assert image.shape == (128, 240, 3)
    below = image[114:]
    assert below[:, :80].max() < 16
    # mean of |200 - 128|, |30 - 128|, |30 - 128| is 89; eight times that is more than white
    assert below[:, 80:].min() > 240
    assert "labels are of size" in capsys.readouterr().out  # "fav3_fp8  8.9 dB" in 80 pixels


def test_labels_and_shapes_of_grids() -> None:
    names = ["cogvideox-2b_fav3_fp8", "wan-2.1-1.3b_sta", "cogvideox-my-model_sdpa", "holiday_1"]
    labels = [label_of(Path(f"{name}.mp4")) for name in names]
    assert labels == ["fav3_fp8", "sta", "sdpa", "holiday_1"]
    assert [columns_for(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 10, 17)] == [
        1,
        2,
        3,
        2,
        3,
        3,
        3,
        3,
        4,
        5,
    ]


@pytest.mark.parametrize(("words", "named"), [
    (["--input_dir", "absent"], "absent"),
    (["--pattern", "wan-*.mp4"], "wan-*.mp4"),
    (["--pattern", "*sdpa*"], "two or more"),
    (["--pattern", ""], "--pattern"),
    (["--labels", "a,b"], "--labels has 2 names for 3"),
    (["--order", "sdpa,fav9"], "fav9"),
    (["--pattern", "*"], "notes.txt cannot be read as a video"),
])  # fmt: skip
def test_errors(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    (folder / "notes.txt").write_text("no video")
    assert cli.main(["stitch", "--input_dir", ".", *words]) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message
    assert not (folder / "comparison_grid.mp4").exists()


def test_a_video_cut_short(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a file, and one without frames, are named."""
    path = folder / "cogvideox-2b_sdpa.mp4"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert cli.main(["stitch", "--input_dir", str(folder)]) == 2
    assert path.name in capsys.readouterr().err


def test_an_output_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("")
    output = folder / "file" / "grid.mp4"
    assert cli.main(["stitch", "--input_dir", str(folder), "--output", str(output)]) == 1
    assert "file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["stitch", "--input_dir", str(folder), "--output", "grid.xyz"])
    assert ".mp4" in capsys.readouterr().err
    assert not list(folder.glob(".*part*"))
