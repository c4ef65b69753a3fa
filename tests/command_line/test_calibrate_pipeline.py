"""Calibrate from a pipeline; its benchmark; patterns in schedule files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calibrate_cases import COMMAND, TILE
from tiny_cogvideox import saved

import video_attn
from video_attn import (
    Dense,
    Radial,
    RadialRule,
    SlidingTile,
    VideoSparse,
    cli,
)
from video_attn.integrations import Schedule, apply
from video_attn.integrations.schedule_file import entry_of
from video_attn.tools.render.model import load_pipeline

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "benchmarks").is_dir())
SMALL = ["--height", "32", "--width", "48", "--num-frames", "9", "--num-steps", "3"]


def test_from_a_pipeline_on_disk_to_a_schedule(tmp_path, capsys):
    """Captures, the choice, the latents of a step; then again, from what is there."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "schedule.json"
    prompts.write_text("a red panda\n\na brook in the morning\n")
    words = ["calibrate", "--pipe", str(saved("2b")), "--prompts", str(prompts), "--steps", "0,2",
             "--captured", str(tmp_path / "q"), "--output", str(output), "--objective", "density",
             "--budget", "0.3", *COMMAND, *SMALL]  # fmt: skip
    assert cli.main([*words, "--check-latents"]) == 0
    out = capsys.readouterr().out
    assert "latents after step 0" in out and "latents after step 2" in out
    about = json.loads(output.read_text())["about"]
    layers = {(layer["step"], layer["layer"]) for layer in about["layers"]}
    assert layers == {(step, layer) for step in (0, 2) for layer in range(3)}
    assert len(about["captures"]) == 12
    assert all(0 <= gap < 0.3 for gap in about["latents"].values())
    schedule = Schedule.load(output)
    assert schedule.num_steps == 3
    pipe = load_pipeline(str(saved("2b")), dtype=None, device="cpu", offload="none", tiling=False)
    with apply(pipe, Dense(), schedule=schedule) as handle:
        pipe("a red panda", height=32, width=48, num_frames=9, num_inference_steps=3,
             max_sequence_length=16, output_type="latent")  # fmt: skip
    assert handle.sparse_calls + handle.dense_calls == 9
    # A run that was killed: what is there is not captured again, what is not there is.
    first, second = (tmp_path / "q" / f"prompt_00{n}" for n in range(2))
    (second / "calibrate.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in first.glob("*.safetensors")}
    assert cli.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in first.glob("*.safetensors")} == before
    assert (second / "calibrate.json").is_file()


def test_budget_0_changes_no_latent_and_1_does(tmp_path):
    pipe = load_pipeline(str(saved("2b")), dtype=None, device="cpu", offload="none", tiling=False)
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}
    latents = {}
    for budget in (0.0, 1.0):
        found = video_attn.calibrate(
            pipe, ["a red panda"], captured=tmp_path / "q", call=call, steps=[0, 1],
            patterns=["sta"], sta_tile=(1, 1, 1), budget=budget, objective="density",
            device="cpu", check_latents=True, output=tmp_path / "schedule.json",
        )  # fmt: skip
        latents[budget] = found.latents
    assert latents[0.0] == {0: 0.0, 1: 0.0}
    assert all(gap > 1e-4 for gap in latents[1.0].values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps: give --pipe"),
        (["--pipe", "none"], "--pipe needs --prompts"),
        (["--pipe", "none", "--prompts", "none.txt"], "cannot be read"),
        (["--explain-step", "1"], "need --explain LAYER HEAD"),
    ],
)
def test_options_of_a_pipeline_that_do_not_fit(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", *words]) == 2
    assert message in capsys.readouterr().err


def test_steps_that_a_run_has_not(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red panda")
    words = ["--pipe", str(saved("2b")), "--prompts", str(prompts), "--steps", "0,3"]
    words += ["--captured", str(tmp_path / "q"), "--output", str(tmp_path / "s.json")]
    assert cli.main(["calibrate", *words, *COMMAND, *SMALL]) == 2
    assert "there are steps 0 to 2 in this run" in capsys.readouterr().err


def test_the_benchmark_runs_what_was_chosen(tmp_path, capsys, monkeypatch):
    """On a tiny video: the errors of the layer as it runs are within each budget."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_calibrate

    path = tmp_path / "record.json"
    words = ["--grid", "4x8x8", "--heads", "4", "--device", "cpu", "--repeats", "1", "--budgets",
             "0.1", "0.5", "--precisions", "native", "--output", str(path)]  # fmt: skip
    assert bench_calibrate.main(words) == 0
    assert "4 heads at 256 tokens" in capsys.readouterr().out
    dense, *budgets = json.loads(path.read_text())["results"]
    assert dense["provider"] == "dense" and dense["metrics"]["search_seconds"] > 0
    for result in budgets:
        metrics = result["metrics"]
        assert metrics["worst_error"] <= metrics["budget"] and metrics["predicted_ms"] > 0


class OwnTiles(SlidingTile):
    """A pattern that a file has no name for."""


def test_patterns_stand_in_a_file_as_they_are_or_not_at_all():
    for pattern in (
        VideoSparse(top_k_ratio=0.2, score_dtype=torch.bfloat16),
        VideoSparse(top_k=3, tile=(2, 4, 4), gate=0.5, score_dtype=torch.float16),
        SlidingTile([(1, 2, 3), (3, 2, 1)], TILE),
        Radial(RadialRule.for_model("wan", 0.2), 64),
        Dense(),
    ):
        assert entry_of(pattern).pattern() == pattern
    with pytest.raises(ValueError, match="OwnTiles cannot stand in a schedule file"):
        entry_of(OwnTiles((1, 1, 1)))
