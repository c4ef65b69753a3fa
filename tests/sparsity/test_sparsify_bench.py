"""benchmarks/bench_sparsify.py at small sizes: it runs, checks itself, and writes its record."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("bench_sparsify")


def test_small_layers(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    words = ["--small", "--device", "cpu", "--repeats", "1", "--output", str(path)]
    assert bench.main(words) == 0
    results = json.loads(path.read_text())["results"]
    assert len(results) == 2 * 2 * 4
    assert {r["provider"] for r in results} == {"dense", "0.5", "0.3", "0.2"}
    assert {r["problem"]["what"] for r in results} == {"layer", "attention"}
    out = capsys.readouterr().out
    assert "1.5-2x" in out and "3.3x" in out


def test_a_layer_that_is_wrong_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = bench._check
    monkeypatch.setattr(bench, "_check", lambda sparse, dense: checked(sparse * 2, dense))
    with pytest.raises(RuntimeError, match="at ratio 1 the layer differs"):
        bench.main(["--small", "--device", "cpu", "--repeats", "1"])
