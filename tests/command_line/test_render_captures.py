"""Captures of a rendering: which are written, on a full disk, after a kill."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from render_cases import LAYERS, frames_of, render
from tiny_cogvideox import saved
from tiny_models import MODELS as TINY
from tiny_models import output

from video_attn.tools.capture import CaptureWriter, Selection, find_captures, load_capture
from video_attn.tools.render import session
from video_attn.tools.render.attention import ModelAttention
from video_attn.tools.render.kinds import parse_kind

pytestmark = pytest.mark.usefixtures("on_quick_backend")


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan15"])
def test_padded_text(name: str, tmp_path: Path) -> None:
    """Padding is no part of a capture, and no type attends to it; items that differ are marked."""
    tiny = TINY[name]
    model, scheduler = tiny.model(), SimpleNamespace(timesteps=torch.tensor([500.0]))
    pipe = SimpleNamespace(transformer=model, scheduler=scheduler)
    expected = [output(model, tiny.inputs(batch)) for batch in (1, 2)]
    for text in ("sdpa", "fav2", "sta:window=9x9x9:tile=2x2x2"):
        made = CaptureWriter(tmp_path, "x", Selection())
        with ModelAttention(pipe, parse_kind(text), writer=made):
            for batch in (1, 2):
                got = output(model, tiny.inputs(batch))
                assert (got - expected[batch - 1]).abs().max() < 1e-4
        captures = [load_capture(path) for path in find_captures(tmp_path)]
        assert len(captures) == 2 * tiny.layers
        one, two = captures[0], captures[tiny.layers]
        assert one.facts.mask == "none" and two.facts.mask == "padded text"
        video = math.prod(tiny.grid)
        assert one.q.shape[2] == one.k.shape[2] == video + (one.facts.text_length or 0)
        assert two.q.shape[2] == video + (two.facts.text_length or 0)


def test_selected_captures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "q"
    words = ["--save_inputs", "--input_dir", str(folder), "--layers", "0,2", "--steps", "1",
             "--max_captures", "0", "--output", str(tmp_path)]  # fmt: skip
    assert render(*words) == 0
    facts = [load_capture(path).facts for path in find_captures(folder)]
    assert [(f.layer, f.step, f.call_idx) for f in facts] == [(0, 1, 3), (2, 1, 5)]
    text = capsys.readouterr().out
    assert "34 tokens (3 x 2 x 3 video, 16 text), batch 2, 2 heads of 16" in text
    assert "up to 2 captures of 26.11 kB" in text and "2 of 6 calls are captured" in text


def test_a_full_disk_ends_the_capture_not_the_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operating system refuses files above 20 kB, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    words = ["--save_inputs", "--input_dir", str(tmp_path / "q"), "--output", str(tmp_path)]
    try:
        assert render(*words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "FAILED: captures ended early" in capsys.readouterr().out
    assert len(frames_of(tmp_path / "cogvideox-2b_sdpa.mp4")) == 9
    index = json.loads((tmp_path / "q" / "sdpa_metadata.json").read_text())
    assert index["saved_count"] == 0 and index["failure"] and index["total_calls"] == 6


def test_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before anything is rendered, with the number that would fit."""
    free = SimpleNamespace(free=session.MARGIN + 100_000)
    monkeypatch.setattr(session.shutil, "disk_usage", lambda path: free)
    words = ["--save_inputs", "--input_dir", str(tmp_path / "q"), "--output", str(tmp_path)]
    assert render(*words) == 2
    assert "--max_captures 3 would fit" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mp4"))


def test_a_killed_rendering_leaves_its_captures(tmp_path: Path) -> None:
    """SIGKILL in the middle: captures and index are there and can be read."""
    words = ["--num_inference_steps", "900", "--save_inputs", "--input_dir", str(tmp_path),
             "--max_captures", "0", "--output", str(tmp_path)]  # fmt: skip
    saved("2b")
    child = os.fork()  # a new Python would take longer to start than all the rest
    if child == 0:
        try:
            torch.set_num_threads(1)
            render(*words)
        finally:
            os._exit(1)
    while len(list(tmp_path.glob("*_input_*"))) < 20:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    captures = find_captures(tmp_path)
    for number, path in enumerate(captures):
        facts = load_capture(path).facts
        assert (facts.step, facts.layer) == divmod(number, LAYERS)
    index = json.loads((tmp_path / "sdpa_metadata.json").read_text())
    assert len(captures) - 1 <= index["saved_count"] <= len(captures)
    assert not list(tmp_path.glob("*.mp4"))
