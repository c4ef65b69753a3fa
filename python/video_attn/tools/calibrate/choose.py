"""The choice: for each head of a layer one candidate, so that the layer is fast and the errors
stay within the budget.

What is looked at does not depend on the budget, and what is within a budget is within a larger one:
so a larger budget never costs more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

BUDGETS = ("head", "layer", "sum")
MOST_GROUPS = 3  # launches of a layer: more of them hardly ever pay
_SMALL = 1e-30  # instead of a division by 0

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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


@dataclass(frozen=True)
class Prices:
    """What a layer costs.

    Args:
        head: of each candidate, what a head adds. launch: of each candidate, what its launch adds.
        own: the candidate that the model does by itself, dense attention in its own precision; it
            is always within the budget.
        parting: what a layer pays whose heads do not all have one candidate: q, k, v and the output
            are moved.
    """

    head: Sequence[float]
    launch: Sequence[float]
    own: int
    parting: float = 0.0

    def of(self, picked: Ints) -> float:
        """Seconds of a layer whose heads have these candidates."""
        used = np.unique(picked)
        parting = self.parting if len(used) > 1 else 0.0
        return float(np.take(self.head, picked).sum() + np.take(self.launch, used).sum()) + parting


class Chooser:
    """Choices for layers, by budget.

    All sets of up to three candidates are looked at, because each candidate that is used is a
    launch. An error of 1 is that of an output of zeros, and more counts as 1: so a budget of 1
    allows everything, and one of 0 only what the model does by itself.

    Args:
        errors: of each layer [heads, candidates], relative L2.
        per: what a budget holds for. "head": each. "layer": the root mean square of its heads.
            "sum": the root mean square of all heads of all layers.

    Raises:
        ValueError: a ``per`` that does not exist.
    """

    def __init__(self, errors: Sequence[Floats], prices: Prices, per: str = "head") -> None:
        if per not in BUDGETS:
            raise ValueError(f"per must be one of {', '.join(BUDGETS)}; got {per!r}")
        self.per = per
        self._errors, self._prices = errors, prices
        self._layers = [_Layer(of_layer, prices) for of_layer in errors]

    def choose(self, budget: float) -> list[Choice]:
        """The cheapest choice for each layer with errors within ``budget``, 0 or more."""
        if self.per == "head":
            picked = [layer.per_head(budget) for layer in self._layers]
        elif self.per == "layer":
            picked = [layer.path.within(budget) for layer in self._layers]
        else:
            picked = _per_sum([layer.path for layer in self._layers], budget)
        return [
            Choice(
                tuple(int(c) for c in candidates),
                tuple(float(of_layer[head, c]) for head, c in enumerate(candidates)),
                self._prices.of(candidates),
            )
            for of_layer, candidates in zip(self._errors, picked, strict=True)
        ]


class _Layer:
    """One layer's errors, and the sets of candidates that its heads may be given."""

    def __init__(self, errors: Floats, prices: Prices) -> None:
        self.errors = np.minimum(errors, 1.0)
        self.errors[:, prices.own] = 0.0
        self.add, self.launch = np.asarray(prices.head), np.asarray(prices.launch)
        self.parting = prices.parting
        self.sets = self._sets()

    def _sets(self) -> Ints:
        """[sets, 3], the cheapest candidate first; smaller sets repeat it. Candidates that another
        one is better than in every way are in none.
        """
        count = self.errors.shape[1]
        kept = [c for c in range(count) if not any(self._beats(d, c) for d in range(count))]
        kept.sort(key=lambda c: (self.add[c], c))
        sets = [
            chosen[:1] * (MOST_GROUPS - size) + chosen
            for size in range(1, MOST_GROUPS + 1)
            for chosen in itertools.combinations(kept, size)
        ]
        return np.array(sets)

    def _beats(self, one: int, other: int) -> bool:
        """Whether ``one`` costs no more and errs no more in any head; of equals, the first does."""
        pairs = [(self.add[one], self.add[other]), (self.launch[one], self.launch[other]),
                 *zip(self.errors[:, one], self.errors[:, other], strict=True)]  # fmt: skip
        better = any(a < b for a, b in pairs) or one < other
        return one != other and better and all(a <= b for a, b in pairs)

    def per_head(self, budget: float) -> Ints:
        """Of every set each head takes the cheapest within its budget; the best of all sets."""
        cost = np.where(self.errors[:, self.sets] <= budget, self.add[self.sets], np.inf)
        places = cost.argmin(2)  # [heads, sets]
        used = (places[..., None] == np.arange(MOST_GROUPS)).any(0)
        seconds = cost.min(2).sum(0) + self.seconds_of_launches(used, self.sets)
        best = int(seconds.argmin())
        return self.sets[best, places[:, best]]

    def seconds_of_launches(self, used: NDArray[np.bool_], sets: Ints) -> Floats:
        """Of the places [..., sets, 3] of ``sets`` that are used."""
        return (used * self.launch[sets]).sum(-1) + self.parting * (used.sum(-1) > 1)

    @cached_property
    def path(self) -> _Path:
        """The choices that a budget for many heads may take."""
        return _Path(self)


class _Path:
    """Choices for a layer, ever dearer and more exact.

    In every set of candidates the heads start at the cheapest and give way, the best exchange of
    squared error for time first. Of all these choices the path has those that are more exact than
    everything cheaper.

    Attributes:
        squares: sums over the heads of squared errors. seconds: of the layer.
    """

    def __init__(self, layer: _Layer) -> None:
        self._sets, heads = layer.sets, len(layer.errors)
        e = np.moveaxis(layer.errors[:, layer.sets] ** 2, 1, 0)  # [sets, heads, 3]
        a = layer.add[layer.sets][:, None]  # [sets, 1, 3]
        worth, self._to, start = _exchanges(e, a)
        # Exchanges of all heads of a set, [sets, 2 * heads], the best first.
        order = np.argsort(-worth, 1, kind="stable")
        self._head, self._to = order // 2, np.take_along_axis(self._to, order, 1)
        source = np.take_along_axis(start, order, 1)
        rows = np.arange(len(e))[:, None]
        gain = e[rows, self._head, source] - e[rows, self._head, self._to]
        price = a[rows, 0, self._to] - a[rows, 0, source]
        places = np.arange(MOST_GROUPS)
        moved = (self._to[..., None] == places).astype(int) - (source[..., None] == places)
        first = np.zeros((len(e), 1, MOST_GROUPS), int)
        first[..., 0] = heads
        used = np.cumsum(np.concatenate([first, moved], 1), 1) > 0  # [sets, 1 + exchanges, 3]
        squares = _from(e[..., 0].sum(1), -gain)
        seconds = _from(heads * a[:, 0, 0], price)
        seconds += layer.seconds_of_launches(used, layer.sets[:, None])
        is_real = np.isfinite(np.take_along_axis(worth, order, 1))
        seconds[:, 1:][~is_real] = np.inf
        squares = squares.clip(0)  # after many differences
        front = np.lexsort((squares.ravel(), seconds.ravel()))
        front = front[np.isfinite(seconds.ravel()[front])]
        least = np.minimum.accumulate(squares.ravel()[front])
        self._front = front[np.append(True, least[1:] < least[:-1])]
        self.squares, self.seconds = squares.ravel()[self._front], seconds.ravel()[self._front]
        self.heads, self._width = heads, squares.shape[1]

    def within(self, budget: float) -> Ints:
        """The candidates of the cheapest choice with a root mean square within ``budget``."""
        return self.candidates(int((np.sqrt(self.squares / self.heads) <= budget).argmax()))

    def candidates(self, number: int) -> Ints:
        """Of each head, in choice ``number`` of the path."""
        chosen, steps = divmod(int(self._front[number]), self._width)
        places = np.zeros(self.heads, int)
        for head, to in zip(self._head[chosen, :steps], self._to[chosen, :steps], strict=True):
            places[head] = to
        return self._sets[chosen, places]

    def hull(self) -> list[int]:
        """The choices that no mixture of two others is better than: the lower convex hull."""
        found: list[int] = []
        for n in range(len(self.squares)):
            while len(found) > 1 and self.slope(found[-2], found[-1]) <= self.slope(found[-1], n):
                found.pop()
            found.append(n)
        return found

    def slope(self, one: int, other: int) -> float:
        """Squared error that a second buys from one choice to another."""
        gain = self.squares[one] - self.squares[other]
        return float(gain / max(self.seconds[other] - self.seconds[one], _SMALL))


def _exchanges(squares: Floats, add: Floats) -> tuple[Floats, Ints, Ints]:
    """What each head of each set [sets, heads, 3] may exchange, at most two after each other:
    (squared error that a second buys, -inf: none; place it goes to; from where) [sets, 2 * heads].
    """

    def worth(one: int, other: int) -> Floats:
        gain = squares[..., one] - squares[..., other]
        price = np.maximum(add[..., other] - add[..., one], _SMALL)
        return np.where(gain > 0, gain / price, -np.inf)

    near, far = worth(0, 1), worth(0, 2)
    then = np.minimum(worth(1, 2), near)  # which rounding alone could break
    to_near = near >= far
    values = np.stack([np.where(to_near, near, far), np.where(to_near, then, -np.inf)], -1)
    to = np.stack([np.where(to_near, 1, 2), np.full(near.shape, 2)], -1)
    start = np.stack([np.zeros(near.shape, int), np.ones(near.shape, int)], -1)
    flat = (len(squares), -1)
    return values.reshape(flat), to.reshape(flat), start.reshape(flat)


def _from(start: Floats, steps: Floats) -> Floats:
    """[sets, 1 + steps]: ``start`` and what it is after each step."""
    return np.cumsum(np.concatenate([start[:, None], steps], 1), 1)


def _per_sum(paths: Sequence[_Path], budget: float) -> list[Ints]:
    """The layers start at their cheapest and give way, the best exchange first."""
    hulls = [path.hull() for path in paths]
    moves = sorted(
        (-path.slope(one, other), layer, place)
        for layer, (path, hull) in enumerate(zip(paths, hulls, strict=True))
        for place, (one, other) in enumerate(itertools.pairwise(hull), 1)
    )
    places = [0] * len(paths)
    heads = sum(path.heads for path in paths)
    squares = np.array([path.squares[0] for path in paths])
    for _, layer, place in moves:
        if np.sqrt(squares.sum() / heads) <= budget:
            break
        squares[layer], places[layer] = paths[layer].squares[hulls[layer][place]], place
    return [p.candidates(h[n]) for p, h, n in zip(paths, hulls, places, strict=True)]
