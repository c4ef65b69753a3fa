"""`video-attn compare`: what is there stays, and one failure ends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from render_cases import SMALL, record_of
from tiny_cogvideox import saved

from video_attn import cli
from video_attn.tools.render import attention, compare

pytestmark = pytest.mark.usefixtures("on_quick_backend")


def compared(folder: Path, types: str, *words: str) -> int:
    return cli.main(["compare", "--model-path", str(saved("2b")), "--output-dir", str(folder),
                     "--types", types, *words, "--", *SMALL])  # fmt: skip


def test_compare_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there of the same options stays, and then no model is loaded."""
    assert compared(tmp_path, "sdpa,fav2") == 0
    loads, real = [], compare.load

    def counted(args: Any) -> Any:
        loads.append(args)
        return real(args)

    monkeypatch.setattr(compare, "load", counted)
    path = tmp_path / "cogvideox-2b_fav2.mp4"
    before = path.stat().st_mtime_ns
    assert compared(tmp_path, "sdpa,fav2", "--stitch") == 0
    assert not loads and path.stat().st_mtime_ns == before
    assert "is there already" in capsys.readouterr().out
    path.write_bytes(b"")  # and its record stays: but the record alone is no video
    path.unlink()
    assert compared(tmp_path, "sdpa,fav2") == 0
    assert len(loads) == 1 and path.is_file()
    assert compared(tmp_path, "fav2", "--force") == 0
    assert len(loads) == 2
    assert cli.main(["compare", "--model-path", str(saved("2b")), "--output-dir", str(tmp_path),
                     "--types", "fav2", *SMALL, "--seed", "1"]) == 0  # fmt: skip
    assert len(loads) == 3 and record_of(path)["options"]["seed"] == 1
    assert record_of(path)["quality"] is None  # the sdpa video is of another seed


def test_compare_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention.named_attention

    def broken(q: Any, k: Any, v: Any, name: str, *rest: Any, **options: Any) -> Any:
        if name == "fav2":
            raise RuntimeError("no backend of attention type 'fav2' can serve")
        return right(q, k, v, name, *rest, **options)

    monkeypatch.setattr(attention, "named_attention", broken)
    assert compared(tmp_path, "fav2,sagev1,fav3", "--stitch") == 1
    text = capsys.readouterr().out
    assert "FAILED: fav2: no backend of attention type 'fav2' can serve" in text
    names = {path.name for path in tmp_path.glob("*.mp4")}
    assert names == {"cogvideox-2b_sagev1.mp4", "cogvideox-2b_fav3.mp4", "comparison_grid.mp4"}
    assert compared(tmp_path, "fav2", "--stitch") == 1
    assert "nothing to stitch" in capsys.readouterr().out
