"""benchmarks/bench_models.py at a small size: every model and pattern is in the record."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_records_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    script = import_module("bench_models")
    words = "--all --small --no-compile --repeats 1 --device cpu --precisions native sage_fp8"
    assert script.main([*words.split(), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name, case in import_module("model_cases").CASES.items():
        path = tmp_path / f"models_{name}_cpu.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        assert len(rows) == 4 * 2
        errors = {(row["provider"], row["problem"]["precision"]): row["metrics"] for row in rows}
        for row in rows:
            assert row["median_ms"] > 0, row
            assert 0 < row["metrics"]["density"] <= 1
            assert row["problem"]["backend"] in ("cpu", "the model's own")
            assert row["problem"]["model"] == case.title
        assert errors["dense", "native"]["output_error"] == 0
        assert errors["dense", "native"]["attention_error"] < 1e-5
        assert 1e-4 < errors["dense", "sage_fp8"]["attention_error"] < 0.1
        assert errors["vsa", "native"]["attention_error"] > 0.01
        assert str(path) in printed


def test_sizes_are_those_of_the_real_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    cases = import_module("model_cases").CASES
    tokens = {
        name: case.tokens[0] * case.tokens[1] * case.tokens[2] for name, case in cases.items()
    }
    assert tokens == {
        "wan": 75600, "hunyuan": 118800, "cogvideox": 17550, "ltx2": 32640, "mochi": 44520,
    }  # fmt: skip
