"""The model that ranks launch rows by what the compiler made of them, against what a card timed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from video_attn.kernels.launch_tables import LaunchRow

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("row_model")


def test_it_ranks_the_rows_of_the_record_it_was_fitted_on(model):
    record = json.loads((FOLDER / "results" / "triton_tune_h100.json").read_text())
    cases = model.cases_of(record)
    assert len(cases) == 18
    assert model.fitted(cases).tolist() == pytest.approx(list(model.WEIGHTS.values()), abs=2e-3)
    by_others = [others for _, others in model.judged(cases).values()]
    correlations, losses = zip(*by_others, strict=True)
    assert sum(correlations) / 18 > 0.8 and min(correlations) >= 0.5
    assert sum(losses) / 18 < 0.01 and max(losses) < 0.08


def test_rates_are_relative_and_fall_with_spills(model):
    row = LaunchRow(128, 64, 8, 3)
    fast, slow = model.Made(180, 0, 128 << 10), model.Made(180, 64, 128 << 10)
    rates = model.predicted_rates([(row, slow), (row, fast)], "sm_90")
    assert rates == pytest.approx([2**-0.2, 1.0])
    one_program = model.Made(180, 0, 200 << 10)
    two_programs = model.Made(120, 0, 100 << 10)
    rates = model.predicted_rates([(row, one_program), (row, two_programs)], "sm_90")
    assert rates[0] < rates[1] == 1.0
    assert model.predicted_rates([(row, fast)], "gfx942") is None


def test_agreement(model):
    assert model.agreement([0.5, 1.0, 0.7], [50.0, 100.0, 70.0]) == (pytest.approx(1.0), 0.0)
    correlation, loss = model.agreement([1.0, 0.5], [75.0, 100.0])
    assert correlation == pytest.approx(-1.0) and loss == pytest.approx(0.25)
    assert model.agreement([1.0], [80.0]) == (1.0, 0.0)
