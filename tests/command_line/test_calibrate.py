"""Calibrate: on heads whose kind is known the choice is known; budgets, costs, files, resuming."""

from __future__ import annotations

import itertools
import json
import weakref
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from known_heads import known_head
from tiny_cogvideox import saved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import video_attn
from video_attn import (
    Dense,
    HeadGroups,
    Radial,
    RadialRule,
    SlidingTile,
    VideoSparse,
    VideoTokens,
    cli,
)
from video_attn.integrations import Schedule, apply
from video_attn.integrations.schedule_file import entry_of
from video_attn.tools.calibrate import Chooser, CostModel, Prices, candidates_for, measure_costs
from video_attn.tools.calibrate import errors as errors_module
from video_attn.tools.calibrate import explain as explain_module
from video_attn.tools.calibrate.costs import count_pairs, fit
from video_attn.tools.calibrate.errors import dense_in_fp32, errors_of_head
from video_attn.tools.capture import Capture, Facts
from video_attn.tools.capture.files import file_name, save_capture
from video_attn.tools.render.model import load_pipeline

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "benchmarks").is_dir())
GRID, TILE, DIM = (6, 8, 8), (2, 2, 2), 32
TOKENS = VideoTokens(GRID)
OPTIONS = {"sta_tile": TILE, "vsa_tile": TILE, "block_size": 16}
COMMAND = ["--sta-tile", "2x2x2", "--vsa-tile", "2x2x2", "--block-size", "16", "--device", "cpu"]


def head(kind: str, seed: int = 0) -> list[Tensor]:
    """q, k, v [1, 1, S, D] of one head of a known kind."""
    return known_head(kind, GRID, dim=DIM, seed=seed)


def cheapest(kind: str, kinds: list[str], budget: float, seed: int) -> str:
    """The name of what is chosen for one head, when pairs are what costs."""
    candidates = candidates_for(TOKENS, kinds, **OPTIONS)
    found = errors_of_head(*head(kind, seed), TOKENS, candidates)
    costs = count_pairs(candidates)
    prices = Prices([costs.head_seconds(c, TOKENS) for c in candidates], [0.0] * len(found), 0)
    [choice] = Chooser([np.array([found])], prices).choose(budget)
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
    found = errors_of_head(q, k, v, TOKENS, candidates, scale=0.3)
    for column, candidate in enumerate(candidates):
        out = candidate.attend(q, k, v, TOKENS, scale=0.3)
        wanted = ((out - reference).norm() / reference.norm()).item()
        assert found[column] == pytest.approx(wanted, rel=1e-3, abs=1e-6)


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of torch's operators held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None:
            self.now += out.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(out, self.free, out.nbytes)
        return out

    def free(self, nbytes: int) -> None:
        self.now -= nbytes


def test_an_error_needs_a_few_chunks_of_memory(monkeypatch):
    """1/128 of what it is on a GPU: all scores would be 64 times a chunk."""
    monkeypatch.setattr(errors_module, "CHUNK_BYTES", 1 << 20)
    tokens = VideoTokens((4, 32, 32))
    q, k, v = (torch.randn(1, 1, tokens.sequence_length, 8) for _ in "qkv")
    candidates = candidates_for(tokens, ["sta", "radial"], **OPTIONS)[:3]
    with LiveBytes() as live:
        errors_of_head(q, k, v, tokens, candidates)
    assert 1 << 20 < live.most < 7 << 20


# -- the choice ------------------------------------------------------------------------------------


def random_layers(seed: int, layers: int = 3) -> tuple[list[np.ndarray], Prices]:
    """Errors [6, 7] of heads of layers, and prices; the last candidate is the model's own."""
    rng = np.random.default_rng(seed)
    errors = [rng.uniform(0, 1.3, (6, 7)) for _ in range(layers)]
    head = [*rng.uniform(0.1, 1, 6), 2.0]
    return errors, Prices(head, list(rng.uniform(0, 1, 7)), own=6, parting=0.3)


def judged(errors: np.ndarray) -> np.ndarray:
    """As a budget sees them: the model's own has none, and zeros would have 1."""
    seen = np.minimum(errors, 1)
    seen[:, 6] = 0
    return seen


def cost(candidates: tuple[int, ...], prices: Prices) -> float:
    used = set(candidates)
    parting = prices.parting if len(used) > 1 else 0
    return sum(prices.head[c] for c in candidates) + sum(prices.launch[c] for c in used) + parting


@pytest.mark.parametrize("per", ["head", "layer", "sum"])
@pytest.mark.parametrize("seed", range(4))
def test_a_larger_budget_never_costs_more(per, seed):
    errors, prices = random_layers(seed)
    chooser, before = Chooser(errors, prices, per), float("inf")
    for budget in np.linspace(0, 1, 23):
        choices = chooser.choose(budget)
        reached = [
            [judged(e)[h, c] for h, c in enumerate(choice.candidates)]
            for e, choice in zip(errors, choices, strict=True)
        ]
        squares = np.square(reached)
        worst = {"head": np.max(reached), "layer": np.sqrt(squares.mean(1)).max(),
                 "sum": np.sqrt(squares.mean())}[per]  # fmt: skip
        assert worst <= budget + 1e-12
        for choice in choices:
            assert choice.seconds == pytest.approx(cost(choice.candidates, prices))
        seconds = sum(choice.seconds for choice in choices)
        assert seconds <= before * (1 + 1e-12)
        before = seconds
    assert {c.candidates for c in chooser.choose(0.0)} == {(6,) * 6}, "budget 0 is dense"
    alone = min(cost((c,) * 6, prices) for c in range(7))
    assert before == pytest.approx(3 * alone), "budget 1 is the cheapest there is"


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_is_cheaper(seed):
    """Against every assignment, for three heads and four candidates: three heads have at most
    three launches. Per layer the path of exchanges may miss the best; it must come near.
    """
    errors, prices = random_layers(seed, 1)
    errors = [errors[0][:3, 3:]]
    prices = Prices(prices.head[3:], prices.launch[3:], own=3, parting=prices.parting)
    seen = np.minimum(errors[0], 1)
    seen[:, 3] = 0
    for budget in (0.2, 0.5, 0.8):
        everything = list(itertools.product(range(4), repeat=3))
        found = {c: [seen[h, n] for h, n in enumerate(c)] for c in everything}
        best = min(cost(c, prices) for c, e in found.items() if max(e) <= budget)
        assert Chooser(errors, prices).choose(budget)[0].seconds == pytest.approx(best)
        rms = {c: float(np.sqrt(np.mean(np.square(e)))) for c, e in found.items()}
        best = min(cost(c, prices) for c, e in rms.items() if e <= budget)
        assert Chooser(errors, prices, "layer").choose(budget)[0].seconds <= 1.3 * best


def test_a_launch_has_its_price():
    """Two heads that want different candidates share one when a second launch costs more, or when
    moving the heads does.
    """
    errors = [np.array([[0.0, 0.05, 0], [0.5, 0.0, 0]])]
    for launch, parting, wanted in ((0.0, 0.0, (0, 1)), (0.5, 0.0, (1, 1)), (0.0, 0.5, (1, 1))):
        prices = Prices([1.0, 1.2, 9.0], [launch] * 3, own=2, parting=parting)
        assert Chooser(errors, prices).choose(0.1)[0].candidates == wanted


def test_what_the_model_does_itself_is_always_within_the_budget():
    """Its own rounding is no error, and an error that is larger than 1 is as bad as zeros."""
    errors = [np.array([[3.0, 0.01]])]
    chooser = Chooser(errors, Prices([1.0, 5.0], [0.0, 0.0], own=1))
    assert chooser.choose(0.0)[0].candidates == (1,)
    assert chooser.choose(0.0)[0].errors == (0.01,)
    assert chooser.choose(1.0)[0].candidates == (0,)
    with pytest.raises(ValueError, match="per must be one of head, layer, sum"):
        Chooser(errors, Prices([1.0, 5.0], [0.0, 0.0], own=1), "step")


def test_at_most_three_launches_of_a_layer():
    """40 heads and 31 candidates that all are of use to some head."""
    rng = np.random.default_rng(0)
    prices = Prices([*rng.uniform(0.1, 1, 30), 2.0], [0.01] * 31, own=30, parting=0.1)
    for per in ("head", "sum"):
        [choice] = Chooser([rng.uniform(0, 1, (40, 31))], prices, per).choose(0.3)
        assert len(choice.groups) <= 3


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
    one, two = (model.seconds(candidates[1], TOKENS, heads) for heads in (1, 2))
    assert two - one == pytest.approx(model.head_seconds(candidates[1], TOKENS))
    other = candidates_for(TOKENS, ["vsa"], **OPTIONS)[1]
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


# -- from a pipeline -------------------------------------------------------------------------------

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
