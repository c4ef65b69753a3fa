"""What `video-attn render` cannot do, and how it says so; the attention types that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from render_cases import render

from video_attn import registry
from video_attn.functional.patterns import Dense, Radial, SlidingTile, VideoSparse
from video_attn.tools import UsageError
from video_attn.tools.render import session
from video_attn.tools.render.kinds import parse_kind
from video_attn.tools.render.model import load_pipeline

pytestmark = pytest.mark.usefixtures("on_quick_backend")


@pytest.mark.parametrize(("words", "named"), [
    (["--attention_type", "fav4"], "fav4"),
    (["--attention_type", "sta:windows=3x3x3"], "windows"),
    (["--attention_type", "sdpa:tile=1x1x1"], "takes no options"),
    (["--attention_type", "radial:dense_layers=4"], "at most 3"),
    (["--height", "33"], "--height 33 must be a multiple of 16"),
    (["--input_dir", "x"], "--save_inputs"),
    (["--max_captures", "3"], "--save_inputs"),
    (["--save_inputs", "--layers", "0,3", "--input_dir", "q"], "--layers 3: there are layers 0 to"),
    (["--save_inputs", "--steps", "2,7", "--input_dir", "q"], "--steps 2,7"),
    (["--offload", "model"], "--offload"),
    (["--output", "x.avi"], ".mp4"),
    (["--device", "cuda:9"], "cuda:9"),
    (["--model_path", "no/such-model"], "no/such-model"),
])  # fmt: skip
def test_options_that_do_not_fit(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert render(*words) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message
    assert not list(tmp_path.glob("*.*"))


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model_index.json"):
        load_pipeline(str(tmp_path), dtype=None, device="cpu", offload="none", tiling=False)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UsageError, match="--model_path"):
        load_pipeline(str(tmp_path), dtype=None, device="cpu", offload="none", tiling=False)


def test_a_type_that_cannot_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with registry.use_backend("hopper"):
        assert render("--attention_type", "fav3", "--output", str(tmp_path)) == 1
    assert "hopper" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mp4"))


def test_what_the_pipeline_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ValueError is a message, not a traceback."""

    def refuse(*args: Any) -> None:
        raise ValueError("num_frames must be odd")

    monkeypatch.setattr(session, "_generate", refuse)
    assert render("--output", str(tmp_path)) == 1
    assert "num_frames must be odd" in capsys.readouterr().err


def test_kinds() -> None:
    assert parse_kind("fav3_fp8").pattern == Dense() and not parse_kind("sdpa").is_sparse
    kind = parse_kind("sta:window=3x5x3:tile=2x4x4:dense_first_steps=12:precision=sage_fp8")
    assert kind.pattern == SlidingTile((3, 5, 3), (2, 4, 4)) and kind.precision == "sage_fp8"
    assert kind.schedule.dense_first_steps == 12
    assert kind.label == "sta-window=3x5x3-tile=2x4x4-dense_first_steps=12-precision=sage_fp8"
    assert parse_kind("vsa").pattern == VideoSparse(top_k_ratio=0.125)
    assert parse_kind("vsa:top_k=4").pattern == VideoSparse(top_k=4)
    assert parse_kind("radial:dense_last_steps=0.1").schedule.dense_last_steps == 0.1
    radial = parse_kind("radial:decay_factor=0.5:block_size=64").pattern
    assert isinstance(radial, Radial) and radial.block_size == 64


@pytest.mark.parametrize("text", [
    "", "STA", "sta:", "sta:window", "sta:window=3x3", "sta:window=0x1x1", "vsa:top_k_ratio=2",
    "vsa:top_k=1:top_k_ratio=0.5", "radial:block_size=0", "radial:decay_factor=wide",
    "radial:precision=fp4", "sta:dense_layers=-1",
])  # fmt: skip
def test_kinds_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError):
        parse_kind(text)
