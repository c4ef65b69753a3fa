"""Calibrate: on heads whose kind is known the choice is known; errors, budgets and costs."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import oracle
import pytest
import token_masks
import torch
from calibrate_cases import OPTIONS, TOKENS, head
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from video_attn import (
    VideoTokens,
)
from video_attn.tools import UsageError
from video_attn.tools.calibrate import Chooser, CostModel, Prices, candidates_for, measure_costs
from video_attn.tools.calibrate import costs as costs_module
from video_attn.tools.calibrate import errors as errors_module
from video_attn.tools.calibrate.costs import count_pairs, fit
from video_attn.tools.calibrate.errors import dense_in_fp32, errors_of_head


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
    everything = token_masks.dense_tokens(TOKENS.sequence_length, TOKENS.sequence_length)
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
    with pytest.raises(UsageError, match="vsa 2x2x2, native"):
        model.seconds(other, TOKENS, 1)
    model.check(16, torch.float32, None)
    with pytest.raises(UsageError, match="for head_dim 16, not 64; backend None, not triton"):
        model.check(64, torch.float32, "triton")


def test_costs_are_measured_on_heads_whose_neighbours_are_alike():
    """Laid out as models do; and parted as a layer may be, with a view and copies."""
    tokens = VideoTokens((2, 24, 24))
    x = costs_module._waves(tokens, 2, 64, torch.device("cpu"), torch.float32)
    assert x.shape == (1, 2, 1152, 64) and x.stride(2) == 2 * 64
    one = torch.nn.functional.normalize(x[0, 1], dim=1)
    assert one[0] @ one[1] > 0.9 and abs(one[0] @ one[-1]) < 0.5
    for heads in (2, 4, 8):
        _, parted = costs_module._apart(heads)
        assert parted.heads == heads and len(parted.groups) == min(heads, 3)
