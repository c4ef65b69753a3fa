"""Calibrate from captures to a schedule: the command, its files, resuming, explain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrate_cases import COMMAND, OPTIONS, TILE, TOKENS, capture_layer, head
from torch import Tensor

import video_attn
from video_attn import (
    Dense,
    HeadGroups,
    VideoTokens,
    cli,
)
from video_attn.integrations import Schedule
from video_attn.tools.calibrate import candidates_for
from video_attn.tools.calibrate import costs as costs_module
from video_attn.tools.calibrate import errors as errors_module
from video_attn.tools.calibrate import explain as explain_module
from video_attn.tools.calibrate.errors import dense_in_fp32


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captures")
    capture_layer(folder, 0, ["local", "by content"])
    capture_layer(folder, 1, ["global", "local"])
    return folder


def calibrate(captured: Path, output: Path, *words: str) -> int:
    start = ["calibrate", "--captured", str(captured), "--output", str(output)]
    try:
        return cli.main([*start, *COMMAND, "--objective", "density", *words])
    except SystemExit as error:  # of argparse
        return int(error.code or 0)


def test_from_captures_to_a_schedule(captured, tmp_path, capsys):
    output, picture = tmp_path / "schedule.json", tmp_path / "choice.png"
    assert calibrate(captured, output, "--budget", "0.1", "--plot", str(picture)) == 0
    assert "vsa" in capsys.readouterr().out
    patterns = Schedule.load(output).patterns(Dense(), 2, 2)
    assert isinstance(patterns[0], HeadGroups) and isinstance(patterns[1], HeadGroups)
    about = json.loads(output.read_text())["about"]
    assert about["budget"] == 0.1 and len(about["captures"]) == 2
    assert 0 < about["predicted_seconds"] < about["dense_seconds"]
    assert picture.stat().st_size > 10_000
    for layer, kinds in enumerate((["local", "by content"], ["global", "local"])):
        q, k, v = (
            torch.cat(x, 1)
            for x in zip(*[head(kind, seed) for seed, kind in enumerate(kinds)], strict=True)
        )
        out, exact = patterns[layer].attend(q, k, v, TOKENS), dense_in_fp32(q, k, v, None)
        for number, recorded in enumerate(about["layers"][layer]["errors"]):
            gap = (out - exact)[:, number].norm() / exact[:, number].norm()
            assert gap <= 0.1 and gap == pytest.approx(recorded, abs=1e-4)


def test_a_killed_search_goes_on(captured, tmp_path, monkeypatch):
    output, calls = tmp_path / "schedule.json", []
    real = errors_module.errors_of_head

    def counted(*args: object, **options: object) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr("video_attn.tools.calibrate.search.errors_of_head", counted)
    assert calibrate(captured, output, "--patterns", "vsa") == 130
    assert not output.exists()
    assert calibrate(captured, output, "--patterns", "vsa") == 0
    assert len(calls) == 5, "only the last of the four heads was measured again"
    assert calibrate(captured, output, "--patterns", "vsa", "--vsa-tile", "3x2x2") == 0
    assert len(calls) == 9, "another tile is another candidate"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--patterns", "sta,moba"), "moba"),
        (("--precisions", "fp4"), "fp4"),
        (("--budget", "-0.1"), "budget must be from 0 (dense) to 1"),
        (("--budget", "nan"), "budget must be from 0 (dense) to 1"),
        (("--plot", "x.pdf"), "png"),
        (("--costs", "none.json"), "for --objective time"),
    ],
)
def test_options_that_do_not_fit(captured, tmp_path, capsys, words, message):
    assert calibrate(captured, tmp_path / "schedule.json", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"grid": None}, "tells no grid"),
        ({"layer": None}, "tells no layer"),
        ({"grid": (6, 8, 4)}, "192"),
        ({"is_causal": True}, "no self-attention"),
        ({"step": 3}, "--num-steps"),
    ],
)
def test_captures_that_do_not_fit(tmp_path, capsys, facts, message):
    folder = tmp_path / "captures"
    capture_layer(folder, 0, ["local"])
    capture_layer(folder, 1, ["local"], **facts)
    output = tmp_path / "schedule.json"
    assert calibrate(folder, output, "--patterns", "vsa", "--budget", "0.5") == 2
    assert message in capsys.readouterr().err


def test_several_folders_are_several_captures_of_a_layer(captured, tmp_path):
    """The worst error counts, or the mean: a head that is global for one prompt stays dense."""
    other, output = tmp_path / "other", tmp_path / "schedule.json"
    capture_layer(other, 0, ["global", "by content"])
    words = ["calibrate", "--captured", str(captured), str(other), "--output", str(output)]
    words += [*COMMAND, "--objective", "density", "--patterns", "sta,vsa", "--budget", "0.1"]
    assert cli.main(words) == 0
    names = json.loads(output.read_text())["about"]["layers"][0]["candidates"]
    assert names == ["dense", "vsa 0.3"]
    assert cli.main([*words, "--over", "mean", "--budget", "0.45"]) == 0
    assert json.loads(output.read_text())["about"]["layers"][0]["candidates"][0] != "dense"


def test_steps_hold_until_the_next_one(tmp_path):
    folder, output = tmp_path / "captures", tmp_path / "schedule.json"
    capture_layer(folder, 0, ["local"], step=1)
    capture_layer(folder, 1, ["global"], layer=0, step=4)
    words = ("--patterns", "sta", "--budget", "0.1", "--num-steps", "6")
    assert calibrate(folder, output, *words) == 0
    schedule = Schedule.load(output)
    kinds = [type(schedule.patterns(Dense(), 1, 1, step, 6)[0]).__name__ for step in range(6)]
    assert kinds == ["SlidingTile"] * 4 + ["Dense"] * 2


def test_windows_in_the_form_of_the_public_search(captured, tmp_path, capsys):
    output, windows = tmp_path / "schedule.json", tmp_path / "windows.json"
    words = ("--patterns", "sta", "--budget", "0.1", "--windows", str(windows))
    assert calibrate(captured, output, *words) == 0
    found = json.loads(windows.read_text())
    assert found == {"0_0_0": [3, 3, 3], "0_0_1": [3, 4, 4], "0_1_0": [3, 4, 4],
                     "0_1_1": [3, 3, 3]}  # fmt: skip
    ours = Schedule.load(output)
    theirs = Schedule.from_windows(windows, tile=TILE)
    q, k, v = (torch.randn(1, 2, TOKENS.sequence_length, 8) for _ in "qkv")
    for layer in range(2):
        a, b = (s.patterns(Dense(), 2, 2)[layer].attend(q, k, v, TOKENS) for s in (ours, theirs))
        torch.testing.assert_close(a, b)
    assert calibrate(captured, output, "--patterns", "vsa", "--windows", str(windows)) == 2
    assert "no window of (6, 8, 8) tiles" in capsys.readouterr().err


def test_costs_are_measured_with_the_captures_and_read_again(
    captured, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(costs_module, "GRIDS_CPU", ((2, 4, 4), (4, 4, 4)))
    costs, output = tmp_path / "costs.json", tmp_path / "schedule.json"
    words = ["calibrate", "--captured", str(captured), "--output", str(output), "--patterns", "sta"]
    predicted = []
    for option in ("--measure-costs", "--costs"):
        assert cli.main([*words, *COMMAND, option, str(costs)]) == 0
        predicted.append(json.loads(output.read_text())["about"]["predicted_seconds"])
    assert predicted[0] == predicted[1] > 0
    costs.write_text(costs.read_text().replace('"head_dim": 32', '"head_dim": 64'))
    assert cli.main([*words, *COMMAND, "--costs", str(costs)]) == 2
    assert "measured for head_dim 64, not 32" in capsys.readouterr().err


@pytest.mark.parametrize("per", ["layer", "sum"])
def test_budgets_for_many_heads(captured, tmp_path, per):
    seconds = []
    for budget in ("0", "0.1", "0.3", "1"):
        output = tmp_path / "schedule.json"
        assert calibrate(captured, output, "--budget", budget, "--per", per) == 0
        about = json.loads(output.read_text())["about"]
        seconds.append(about["predicted_seconds"])
        errors = [layer["errors"] for layer in about["layers"]]
        rms = np.sqrt(np.mean(np.square(np.minimum(errors, 1)), None if per == "sum" else 1))
        assert (rms <= float(budget) + 1e-3).all()
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] == about["dense_seconds"] and seconds[3] < seconds[1]


# -- explain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_first", [False, True])
def test_what_a_candidate_keeps_is_what_it_sees(text_first):
    """Against masks of tokens, and the sliding window by its definition; with text."""
    tokens = VideoTokens((5, 6, 7), 3, text_first)
    q, k, v = (torch.randn(1, 1, tokens.sequence_length, 8) for _ in "qkv")
    rows = torch.arange(0, tokens.sequence_length, 7)
    for candidate in candidates_for(tokens, ["sta", "vsa", "radial"], **OPTIONS)[1:]:
        seen = explain_module._seen(candidate.pattern, q, k, v, tokens, rows, None)
        weights = explain_module._attention(q, k, rows, None) * seen
        out = candidate.attend(q, k, v, tokens)[0, 0, rows]
        torch.testing.assert_close(weights @ v[0, 0] / weights.sum(1, keepdim=True), out)


def test_explain_draws_one_head(captured, tmp_path, capsys):
    output = tmp_path / "schedule.json"
    assert calibrate(captured, output, "--explain", "0", "1") == 0
    assert (tmp_path / "schedule_layer0_head1.png").stat().st_size > 20_000
    assert calibrate(captured, output, "--explain", "0", "2") == 2
    assert "layer 0 has heads 0 to 1, not 2" in capsys.readouterr().err
    assert calibrate(captured, output, "--explain", "7", "0") == 2
    assert "layers 0, 1 are captured, not 7" in capsys.readouterr().err
    found = video_attn.calibrate(
        captured=captured, objective="density", device="cpu", sta_tile=TILE, vsa_tile=TILE,
        block_size=16,
    )  # fmt: skip
    kept = explain_module.explain(found, 0, 1)
    assert kept[0].name == "dense" and kept[0].share == pytest.approx(1)
    assert [one.name for one in kept if one.is_chosen] == ["vsa 0.3"]
    assert all(0 < one.share <= 1 + 1e-6 for one in kept)
    chosen = next(one for one in kept if one.is_chosen)
    assert chosen.share > 0.99 and chosen.density < 0.35
