"""Pictures of radial attention: the pixels say what the masks say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from radial_oracle import Definition, block_mask

from video_attn import VideoLayout, cli
from video_attn.patterns.radial import RadialRule
from video_attn.patterns.scene import Scenes
from video_attn.tools.plot import radial as plot_radial
from video_attn.tools.plot import style


def cells_of(axes: plot_radial.Axes, frame: style.Frame, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the colour a third into each cell of an image, beside any number."""
    places = np.stack(np.indices((size, size)), -1).reshape(-1, 2)
    columns, rows = axes.transData.transform(places[:, ::-1] + 0.3).astype(int).T
    return frame[frame.shape[0] - 1 - rows, columns].reshape(size, size, 3)


def is_color(cells: np.ndarray, color: str) -> np.ndarray:
    return (cells == np.array(style.rgb(color), np.uint8)).all(-1)


@pytest.mark.parametrize("text, text_first", [(0, False), (9, True), (9, False)])
@pytest.mark.parametrize("scenes", [None, Scenes([0, 2, 5], "adjacent", unit="latent")])
def test_picture_shows_the_mask(text: int, text_first: bool, scenes: Scenes | None) -> None:
    layout = VideoLayout((5, 4, 6), (1, 4, 6), text, text_first)
    allowed = None if scenes is None else tuple(map(tuple, scenes.frame_pairs(5).tolist()))
    definition = Definition(
        5, 24, 4, text, text_first, decay=0.2, neighbor=0.25, min_window=1, split=0, allowed=allowed
    )
    rule = RadialRule(decay_factor=0.2, neighbor_fraction=0.25, min_window=1, split_width=0)
    drawing = plot_radial.draw(layout, rule, 4, scenes)
    frame = style.pixels(drawing.figure)
    seen = block_mask(definition).numpy()
    cells = cells_of(drawing.blocks, frame, len(seen))
    is_text = [definition.frame_of(position) is None for position in range(definition.length)]
    holds_text = np.array([any(is_text[4 * i : 4 * i + 4]) for i in range(len(seen))])
    holds_text = holds_text[:, None] | holds_text
    assert (is_color(cells, style.MIXED) == holds_text).all()
    assert (is_color(cells, style.SEEN) == (seen & ~holds_text)).all()
    assert (is_color(cells, style.EMPTY) == ~seen).all()
    pairs = cells_of(drawing.frames, frame, 5).astype(int)
    density = drawing.density
    assert density.diagonal().min() == 1 and density.min() < 0.5
    expected = np.round(255 * plot_radial.SHARE(density)[..., :3])
    assert np.abs(pairs - expected).max() <= 1
    heights = [bar.get_height() for bar in drawing.distances.patches]
    frames = np.arange(5)
    distance = np.abs(frames[:, None] - frames)
    assert heights == pytest.approx([density[distance == d].mean() for d in range(5)])
    lines = [
        line.get_xdata()[0] for line in drawing.frames.lines if line.get_color() == style.QUERY
    ]
    assert (1.5 in lines) == (scenes is not None)


def test_colours_run_from_skipped_to_seen() -> None:
    assert plot_radial.SHARE(0.0)[:3] == pytest.approx(to_rgb(style.EMPTY))
    assert plot_radial.SHARE(1.0)[:3] == pytest.approx(to_rgb(style.SEEN))


SMALL = ["--grid", "5x4x6", "--text", "9", "--block-size", "8"]


@pytest.mark.parametrize("name, more", [
    ("radial", []),
    ("radial", ["--text-last", "--model", "wan", "--decay", "0.3", "--pooling", "cover"]),
    ("scene", ["--boundaries", "0,6,17"]),
    ("scene", ["--boundaries", "0,2,5", "--unit", "latent", "--adjacency", "10,11"]),
    ("scene", ["--boundaries", "0,6,17", "--scene-sink", "--sink", "exempt"]),
    ("scene", ["--boundaries", "0,20,33", "--temporal-patch", "2", "--straddle", "later"]),
])  # fmt: skip
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, more: list[str]) -> None:
    out = tmp_path / f"{name}.png"
    assert cli.main(["plot", name, *SMALL, *more, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert Image.open(out).size == (1300, 590)


@pytest.mark.parametrize("arguments, words", [
    (["radial", "--grid", "5x4"], "'5x4' is not TxHxW"),
    (["radial", "--text", "-1"], "'-1' is not a whole number"),
    (["radial", "--decay", "0"], "'0' is not a number above 0"),
    (["radial", "--model", "mochi"], "invalid choice: 'mochi'"),
    (["radial", "--out", "radial.gif"], "must end in .png"),
    (["scene", "--boundaries", "0,a"], "'0,a' is not whole numbers"),
    (["scene", "--boundaries", "0,60"], "within the video of 17 pixel frames, got 60"),
    (["scene", "--boundaries", "5,9"], "start with 0"),
    (["scene", "--adjacency", "near"], "'near' is not adjacent, all, or rows"),
    (["scene", "--boundaries", "0,6,17", "--adjacency", "11"], "adjacency must be 2 x 2"),
    (["scene", "--boundaries", "0,6,17", "--adjacency", "01,11"], "True on the diagonal"),
])  # fmt: skip
def test_wrong_options(capsys: pytest.CaptureFixture, arguments: list[str], words: str) -> None:
    name, *rest = arguments
    try:
        code = cli.main(["plot", name, *SMALL, *rest])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.split())
