"""benchmarks/bench_models.py at a small size: every model and pattern is in the record."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_record_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    script, path = import_module("bench_models"), tmp_path / "models.json"
    words = [
        "--all",
        "--small",
        "--no-compile",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--output",
        str(path),
    ]
    monkeypatch.setattr(script, "PRECISIONS", ("native", "sage_fp8"))
    assert script.main(words) == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = record["results"]
    cases = import_module("model_cases").CASES
    assert len(rows) == len(cases) * (1 + 3 * 2)
    for row in rows:
        assert row["median_ms"] > 0, row
        dense = row["provider"] == "dense"
        assert (row["metrics"]["relative_l2_error"] == 0) or not dense
        assert 0 < row["metrics"]["density"] <= 1
        assert row["problem"]["backend"] in ("cpu", "the model's own")
    assert {row["problem"]["model"] for row in rows} == {case.title for case in cases.values()}
    assert str(path) in capsys.readouterr().out


def test_sizes_are_those_of_the_real_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    cases = import_module("model_cases").CASES
    tokens = {
        name: case.tokens[0] * case.tokens[1] * case.tokens[2] for name, case in cases.items()
    }
    assert tokens == {
        "wan": 75600, "hunyuan": 118800, "cogvideox": 17550, "ltx2": 32640, "mochi": 44520,
    }  # fmt: skip
