"""Calibrate: on heads whose kind is known the choice is known; budgets, costs, files, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from video_attn import Dense, HeadGroups, VideoTokens, cli
from video_attn.integrations import Schedule
from video_attn.tools.calibrate import CostModel, candidates_for, choose, measure_costs
from video_attn.tools.calibrate import errors as errors_module
from video_attn.tools.calibrate.costs import count_pairs, fit
from video_attn.tools.calibrate.errors import dense_in_fp32, head_errors
from video_attn.tools.capture import Capture, Facts
from video_attn.tools.capture.files import file_name, save_capture

GRID, TILE, DIM = (6, 8, 8), (2, 2, 2), 32
TOKENS = VideoTokens(GRID)
OPTIONS = {"sta_tile": TILE, "vsa_tile": TILE, "block_size": 16}
COMMAND = ["--sta-tile", "2x2x2", "--vsa-tile", "2x2x2", "--block-size", "16", "--device", "cpu"]


def positions() -> Tensor:
    axes = [torch.arange(n, dtype=torch.float64) for n in GRID]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def near(widths: tuple[float, float, float], seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys whose attention falls off with distance: about ``widths`` tokens per axis,
    inf for an axis that does not matter. Random Fourier features of a Gaussian.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(3, DIM // 2, generator=generator, dtype=torch.float64)
    angles = positions() / torch.tensor(widths, dtype=torch.float64) @ frequencies
    features = torch.cat([angles.cos(), angles.sin()], 1) * (2 / DIM) ** 0.5
    sharp = features * (12 * DIM**0.5) ** 0.5
    return sharp.float(), sharp.float()


def by_content(seed: int) -> tuple[Tensor, Tensor]:
    """Tiles in six groups, scattered over the video, that see their own group."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = (positions() // 2).long().T
    group = torch.randint(0, 6, (3, 4, 4), generator=generator)[t, h, w]
    features = torch.nn.functional.one_hot(group, DIM).float() * 8
    return features, features


def alike() -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(TOKENS.sequence_length, DIM)
    return zeros, zeros


HEADS = {
    "local": lambda seed: near((2.0, 2.5, 2.5), seed),
    "local in space": lambda seed: near((float("inf"), 2.5, 2.5), seed),
    "local in time": lambda seed: near((0.7, float("inf"), float("inf")), seed),
    "by content": by_content,
    "global": lambda seed: alike(),
}


def head(kind: str, seed: int = 0) -> list[Tensor]:
    """q, k, v [1, 1, S, D] of one head of a known kind."""
    q, k = HEADS[kind](seed)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed + 99))
    return [x[None, None] for x in (q, k, v)]


def cheapest(kind: str, kinds: list[str], budget: float, seed: int) -> str:
    """The name of what is chosen for one head, when pairs are what costs."""
    candidates = candidates_for(TOKENS, kinds, **OPTIONS)
    found = head_errors(*head(kind, seed), TOKENS, candidates).numpy()
    costs = count_pairs(candidates)
    add = [costs.head_seconds(c, TOKENS) for c in candidates]
    choice = choose(found, add, [0.0] * len(add), budget)
    return candidates[choice.candidates[0]].name


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "kinds", "right"),
    [
        ("local", ["sta"], "sta 3x3x3"),
        ("local in space", ["sta", "radial"], "sta 3x3x3"),  # three tiles are all of the time
        ("local in time", ["sta", "vsa"], "sta 1x4x4"),
        ("local in time", ["radial"], "radial 0.2"),
        ("by content", ["sta", "vsa", "radial"], "vsa 0.3"),
        ("global", ["sta", "vsa", "radial"], "dense"),
    ],
)
def test_the_choice_for_heads_of_a_known_kind(kind, kinds, right, seed):
    assert cheapest(kind, kinds, 0.1, seed) == right


def test_errors_are_those_of_the_definition(monkeypatch):
    monkeypatch.setattr(errors_module, "CHUNK_BYTES", 5 * 4 * 384)  # five rows at a time
    q, k, v = head("local")
    exact = dense_in_fp32(q, k, v, 0.3)
    everything = oracle.dense_tokens(TOKENS.sequence_length, TOKENS.sequence_length)
    reference = oracle.attention_oracle(q, k, v, everything, 0.3)[0]
    assert (exact - reference).norm() < 5e-6 * reference.norm()
    candidates = candidates_for(TOKENS, ["vsa"], ["native", "sage_fp16"], **OPTIONS)
    found = head_errors(q, k, v, TOKENS, candidates, scale=0.3)
    for column, candidate in enumerate(candidates):
        out = candidate.attend(q, k, v, TOKENS, scale=0.3)
        wanted = ((out - reference).norm() / reference.norm()).item()
        assert found[0, column] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


# -- the choice ------------------------------------------------------------------------------------


def random_layer(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors [6, 7] of heads, and what heads and launches cost; the last candidate is exact."""
    rng = np.random.default_rng(seed)
    errors = rng.uniform(0, 1, (6, 7))
    errors[:, -1] = 0
    return errors, np.append(rng.uniform(0.1, 1, 6), 2.0), rng.uniform(0, 1, 7)


@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize("seed", range(4))
def test_a_larger_budget_never_costs_more(per, seed):
    errors, add, launch = random_layer(seed)
    before = float("inf")
    for budget in np.linspace(0, 1, 23):
        choice = choose(errors, add, launch, budget, per)
        reached = choice.layer_error if per == "layer" else max(choice.errors)
        assert reached <= budget
        used = sorted(choice.groups)
        wanted = sum(add[c] for c in choice.candidates) + sum(launch[c] for c in used)
        assert choice.seconds == pytest.approx(wanted)
        assert choice.seconds <= before * (1 + 1e-12)
        before = choice.seconds
    assert choose(errors, add, launch, 0.0, per).candidates == (6,) * 6, "budget 0 is dense"
    everything = choose(errors, add, launch, 1.0, per)
    alone = [add[c] * 6 + launch[c] for c in range(7)]
    assert everything.seconds <= min(alone) * (1 + 1e-12), "budget 1 is the cheapest there is"


def test_per_head_is_the_best_of_all():
    """Against every assignment of up to three candidates, for two heads and four candidates."""
    errors, add, launch = (x[..., :4] for x in random_layer(9))
    errors = errors[:2]
    errors[:, 3] = 0
    best = min(
        add[a] + add[b] + sum(launch[c] for c in {a, b})
        for a in range(4) for b in range(4) if errors[0, a] <= 0.5 and errors[1, b] <= 0.5
    )  # fmt: skip
    assert choose(errors, add, launch, 0.5).seconds == pytest.approx(best)


def test_a_launch_has_its_price():
    """Two heads that want different candidates share one when a second launch costs more."""
    errors = np.array([[0.0, 0.05], [0.5, 0.0]])
    assert choose(errors, [1.0, 1.2], [0.0, 0.0], 0.1).candidates == (0, 1)
    assert choose(errors, [1.0, 1.2], [0.5, 0.5], 0.1).candidates == (1, 1)


def test_a_budget_that_nothing_meets_names_the_head():
    with pytest.raises(ValueError, match=r"head 1 has at least 0.3"):
        choose(np.array([[0.1], [0.3]]), [1.0], [0.0], 0.2)


# -- costs -----------------------------------------------------------------------------------------


def test_the_fit_finds_the_costs_that_made_the_times():
    rng = np.random.default_rng(0)
    rows = np.stack([np.ones(12), rng.uniform(1e3, 1e5, 12), rng.uniform(1e6, 1e9, 12)], 1)
    cost = fit(rows, rows @ np.array([2e-5, 3e-9, 4e-12]))
    assert (cost.launch, cost.per_token, cost.per_pair) == pytest.approx((2e-5, 3e-9, 4e-12))
    assert cost.worst_fit < 1e-6
    flat = fit(rows, np.full(12, 1e-3))
    assert min(flat.launch, flat.per_token, flat.per_pair) >= 0


def test_costs_are_measured_kept_and_read(tmp_path):
    candidates = candidates_for(TOKENS, ["sta"], **OPTIONS)
    grids = ((2, 4, 4), (4, 4, 4))
    model = measure_costs(
        candidates, device=torch.device("cpu"), head_dim=16, dtype=torch.float32, repeats=1,
        grids=grids,
    )  # fmt: skip
    assert set(model.costs) == {"sta 2x2x2, native", "dense, native"}
    assert all(c.launch + c.per_token + c.per_pair > 0 for c in model.costs.values())
    path = tmp_path / "costs.json"
    model.save(path)
    assert CostModel.load(path) == model
    one, two = (model.seconds(candidates[0], TOKENS, heads) for heads in (1, 2))
    assert two - one == pytest.approx(model.head_seconds(candidates[0], TOKENS))
    other = candidates_for(TOKENS, ["vsa"], **OPTIONS)[0]
    with pytest.raises(Exception, match="vsa 2x2x2, native"):
        model.seconds(other, TOKENS, 1)


# -- the command -----------------------------------------------------------------------------------


def capture_layer(folder: Path, call: int, kinds: list[str], **facts: object) -> None:
    folder.mkdir(exist_ok=True)
    heads = [head(kind, seed) for seed, kind in enumerate(kinds)]
    q, k, v = (torch.cat(parts, 1) for parts in zip(*heads, strict=True))
    options = {"layer": call, "step": 0, "grid": GRID, "text_length": 0, "text_first": False}
    capture = Capture(q, k, v, Facts(kernel="sdpa", call_idx=call, **options | facts))
    save_capture(capture, folder / file_name("sdpa", call, "safetensors"))


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("captures")
    capture_layer(folder, 0, ["local", "by content"])
    capture_layer(folder, 1, ["global", "local"])
    return folder


def calibrate(captured: Path, output: Path, *words: str) -> int:
    start = ["calibrate", "--captured", str(captured), "--output", str(output)]
    return cli.main([*start, *COMMAND, "--objective", "density", *words])


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
    real = errors_module.head_errors

    def counted(*args: object, **options: object) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr("video_attn.tools.calibrate.search.head_errors", counted)
    assert calibrate(captured, output, "--patterns", "vsa") == 130
    assert not output.exists()
    assert calibrate(captured, output, "--patterns", "vsa") == 0
    assert len(calls) == 3, "the first capture was not measured again"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--patterns", "sta,moba"), "moba"),
        (("--precisions", "fp4"), "fp4"),
        (("--budget", "0"), "--budget must be > 0"),
        (("--plot", "x.pdf"), "must end in .png"),
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
