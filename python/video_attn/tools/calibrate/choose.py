"""The choice: for each head of a layer one candidate, so that the layer is fast and the errors
stay within the budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUDGETS = ("head", "layer")
MOST_GROUPS = 3  # launches of a layer: more of them hardly ever pay


@dataclass(frozen=True)
class Choice:
    """One layer's choice.

    Args:
        candidates: the number of the candidate of each head.
        errors: of each head. seconds: predicted for the layer.
    """

    candidates: tuple[int, ...]
    errors: tuple[float, ...]
    seconds: float

    @property
    def groups(self) -> dict[int, list[int]]:
        """{candidate: its heads}, in the order of the first head."""
        found: dict[int, list[int]] = {}
        for head, candidate in enumerate(self.candidates):
            found.setdefault(candidate, []).append(head)
        return found

    @property
    def layer_error(self) -> float:
        """Root mean square of the heads' errors."""
        return float(np.sqrt(np.mean(np.square(self.errors))))


def choose(
    errors: NDArray[np.float64],
    head_seconds: Sequence[float],
    launch_seconds: Sequence[float],
    budget: float,
    per: str = "head",
) -> Choice:
    """The cheapest choice whose errors are within ``budget``.

    All sets of up to three candidates are looked at, because each candidate that is used is a
    launch. Per head, every head takes the cheapest of the set within its budget. Per layer, heads
    start at the cheapest and give way, the best exchange of error for time first, until the root
    mean square of their errors is within the budget. What is within a budget is within a larger
    one, and the steps do not depend on the budget: so a larger budget never costs more time.

    Args:
        errors: [heads, candidates], relative L2.
        head_seconds, launch_seconds: of each candidate, what a head and what a launch adds.
        budget: the largest error allowed. per: "head" or "layer".

    Raises:
        ValueError: no candidate is within the budget, for the head that is named; or a ``per`` that
            does not exist.
    """
    if per not in BUDGETS:
        raise ValueError(f"per must be one of {', '.join(BUDGETS)}; got {per!r}")
    heads, count = errors.shape
    add, launch = np.asarray(head_seconds), np.asarray(launch_seconds)
    within = errors <= budget
    lost = np.flatnonzero(~within.any(1))
    if lost.size and (per == "head" or _rms(errors.min(1)) > budget):
        raise ValueError(
            f"budget {budget:g} is less than the error of every candidate: head {lost[0]} has at "
            f"least {errors[lost[0]].min():.2g}; allow more, or add a more exact precision"
        )
    best: Choice | None = None
    for size in range(1, min(MOST_GROUPS, count, heads) + 1):
        for chosen in itertools.combinations(range(count), size):
            found = (_per_head if per == "head" else _per_layer)(
                errors[:, chosen], add[list(chosen)], launch[list(chosen)], budget
            )
            if found is not None and (best is None or found[1] < best.seconds):
                picked = tuple(chosen[place] for place in found[0])
                own = tuple(float(errors[head, c]) for head, c in enumerate(picked))
                best = Choice(picked, own, found[1])
    assert best is not None  # the most exact candidates are always within
    return best


def _per_head(
    errors: NDArray[np.float64], add: NDArray[np.float64], launch: NDArray[np.float64],
    budget: float,
) -> tuple[list[int], float] | None:  # fmt: skip
    cost = np.where(errors <= budget, add, np.inf)
    picked = cost.argmin(1)
    if not np.isfinite(cost.min(1)).all():
        return None
    return picked.tolist(), _seconds(picked, add, launch)


def _per_layer(
    errors: NDArray[np.float64], add: NDArray[np.float64], launch: NDArray[np.float64],
    budget: float,
) -> tuple[list[int], float] | None:  # fmt: skip
    """The cheapest point within the budget on one path, which does not depend on the budget."""
    heads = np.arange(len(errors))
    picked = np.full(len(errors), int(add.argmin()))
    best: tuple[list[int], float] | None = None
    while True:
        seconds = _seconds(picked, add, launch)
        if _rms(errors[heads, picked]) <= budget and (best is None or seconds < best[1]):
            best = picked.tolist(), seconds
        gain = errors[heads, picked, None] ** 2 - errors**2
        price = np.maximum(add[None] - add[picked, None], 1e-12)
        worth = np.where(gain > 0, gain / price, -np.inf)
        head, candidate = np.unravel_index(int(worth.argmax()), worth.shape)
        if not worth[head, candidate] > 0:
            return best
        picked[head] = candidate


def _seconds(
    picked: NDArray[np.int64], add: NDArray[np.float64], launch: NDArray[np.float64]
) -> float:
    return float(add[picked].sum() + launch[np.unique(picked)].sum())


def _rms(errors: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
