"""The benchmark of several GPUs runs, checks itself and writes what it should; nothing on speed."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from benchmark_cases import FOLDER
from rank_pool import RANKS, RankPool

PAGE = FOLDER.parent / "docs" / "distributed.md"


@pytest.mark.parametrize(
    ("patterns", "kinds", "backward"),
    [(("dense", "sta", "vsa"), ("ulysses", "ring"), False), (("sta",), ("ring",), True)],
)
def test_small_sizes(
    ranks: RankPool, tmp_path: Path, patterns: tuple[str], kinds: tuple[str], backward: bool
) -> None:
    out = tmp_path / "record.json"
    arguments = ["--patterns", *patterns, "--kinds", *kinds, *["--backward"] * backward]
    ranks.run(RANKS, "benchmark_cases:small", str(out), arguments)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["benchmark"] == "distributed"
    results = record["results"]
    passes = ("forward", "forward and backward") if backward else ("forward",)
    expected = [
        (pattern, direction, provider)
        for pattern in patterns
        for kind in kinds
        for direction in passes
        for provider in (*["one GPU"] * (kind == kinds[0]), f"4 ranks, {kind}")
    ]
    found = [(r["problem"]["pattern"], r["problem"]["pass"], r["provider"]) for r in results]
    assert found == expected
    assert all(r["metrics"]["sent_mb"] > 0 for r in results if r["provider"] != "one GPU")


def test_the_page_says_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    bench = import_module("bench_distributed")
    planned = bench._planned(bench.MODELS["wan"], 8)
    row = " | ".join(["wan", "8", *(f"{n / 1e6:.0f}" for n in planned)])
    assert f"| {row} |" in PAGE.read_text(encoding="utf-8")
