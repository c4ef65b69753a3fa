"""What one looks at: which head keeps how much, and what time an error buys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..plot.style import INK, QUERY, SEEN, headline, new_figure, pixels, save
from .calibration import Calibration, Place
from .choose import Choice

MARKS = {"sta": "S", "vsa": "V", "radial": "R", "dense": "D"}


def draw(found: Calibration, path: Path, budgets: Sequence[float] = ()) -> None:
    """Writes a picture (.png): a heat map of layers and heads for the first captured step, and the
    curve of error against time.

    Args:
        budgets: of the curve.
    """
    step = min(place[0] for place in found.choices)
    layers = sorted(layer for of_step, layer in found.choices if of_step == step)
    heads = len(found.choices[step, layers[0]].candidates)
    figure = new_figure(max(8.0, 4.5 + 0.3 * heads), max(4.0, 2.2 + 0.25 * len(layers)))
    headline(
        figure,
        f"Attention per head, budget {found.budget:g} per {found.per}",
        f"{found.seconds / found.dense_seconds:.1%} of dense attention, counted in "
        f"{found.costs.machine if found.costs.is_count else 'time on ' + found.costs.machine}",
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    figure.subplots_adjust(left=0.09, right=0.97, top=0.76, bottom=0.16, wspace=0.3)
    kept = {n: c.pattern.density(found.tokens) for n, c in enumerate(found.candidates)}
    shares = np.array(
        [[kept[n] for n in found.choices[step, layer].candidates] for layer in layers]
    )
    image = left.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, layer in enumerate(layers):
        for head, number in enumerate(found.choices[step, layer].candidates):
            mark = MARKS[found.candidates[number].kind.split()[0]]
            color = "white" if shares[row, head] > 0.6 else INK
            left.text(head, row, mark, ha="center", va="center", size=8, color=color)
    left.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    left.set(xlabel="head", ylabel="layer")
    left.set_title(
        f"step {step}: share of pairs; Sliding, Video sparse, Radial, Dense",
        size=9, loc="left",
    )  # fmt: skip
    figure.colorbar(image, ax=left, fraction=0.04)
    points = curve(found, budgets)
    dense = found.dense_seconds
    right.plot([p[1] for p in points], [p[2] / dense for p in points], "o-", color=SEEN, ms=3)
    right.plot([_mean_error(found.choices)], [found.seconds / dense], "o", color=QUERY, ms=8)
    right.axhline(1.0, color=INK, lw=0.8, ls=":")
    right.set(xlabel="mean error of the heads", ylabel="cost, dense = 1", ylim=(0, None))
    right.set_title("the choice among other budgets", size=9, loc="left")
    save([pixels(figure)], path, fps=1)


def curve(found: Calibration, budgets: Sequence[float] = ()) -> list[tuple[float, float, float]]:
    """(budget, mean error reached, predicted seconds) of several budgets, of what was measured."""
    points = []
    for budget in budgets or (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0):
        choices = found.at(budget)
        points.append((budget, _mean_error(choices), sum(c.seconds for c in choices.values())))
    return points


def _mean_error(choices: dict[Place, Choice]) -> float:
    """Errors above 1, that of zeros, count as 1."""
    return float(np.mean([min(e, 1.0) for choice in choices.values() for e in choice.errors]))
