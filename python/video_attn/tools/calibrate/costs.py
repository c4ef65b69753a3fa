"""What a launch of each candidate takes on this machine: a model, fitted to measurements.

seconds = launch + heads · (tokens · per_token + pairs · per_pair), with the pairs of tokens that a
head computes. The first is what a launch costs however small, the second what is done to every
token (moving it to tile order, quantizing), the third the attention itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...device import device_info
from ...functional.patterns import Dense, Pattern, Radial, SlidingTile, VideoSparse
from ...functional.video_tokens import VideoTokens
from ...layout import Triple
from ...patterns.radial import RadialRule
from .. import UsageError
from ..bench.timing import time_interleaved
from .candidates import Candidate

GRIDS_GPU: tuple[Triple, ...] = ((6, 32, 32), (12, 32, 48), (18, 48, 48))
GRIDS_CPU: tuple[Triple, ...] = ((4, 8, 8), (4, 12, 16), (8, 16, 16))
HEADS = (1, 4)
_PAIRS = "pairs of tokens"


class Cost(BaseModel):
    """Coefficients of one kind of launch, in seconds, and the largest relative error of the fit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    launch: float = Field(ge=0)
    per_token: float = Field(ge=0)
    per_pair: float = Field(ge=0)
    worst_fit: float = Field(default=0.0, ge=0)


class CostModel(BaseModel):
    """The costs of one machine.

    Args:
        machine: its name. head_dim, dtype: what was measured.
        costs: by :attr:`Candidate.kind` and precision, as "sta 6x8x8, native".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    machine: str
    head_dim: int
    dtype: str
    costs: dict[str, Cost]

    @property
    def is_count(self) -> bool:
        """Whether the costs are numbers of pairs, not seconds."""
        return self.machine == _PAIRS

    def seconds(self, candidate: Candidate, tokens: VideoTokens, heads: int) -> float:
        """Predicted seconds of one launch for so many heads of one batch item.

        Raises:
            UsageError: nothing like it was measured.
        """
        cost = self._cost(candidate)
        return cost.launch + heads * self.head_seconds(candidate, tokens)

    def head_seconds(self, candidate: Candidate, tokens: VideoTokens) -> float:
        """What one more head adds to a launch."""
        cost = self._cost(candidate)
        length = tokens.sequence_length
        pairs = candidate.pattern.density(tokens) * length**2
        return length * cost.per_token + pairs * cost.per_pair

    def launch(self, candidate: Candidate) -> float:
        """What one more launch costs."""
        return self._cost(candidate).launch

    def _cost(self, candidate: Candidate) -> Cost:
        key = cost_key(candidate)
        if key not in self.costs:
            raise UsageError(
                f"the costs hold no {key!r}, only {', '.join(sorted(self.costs))}; measure them "
                "with --measure-costs"
            )
        return self.costs[key]

    def save(self, path: Path) -> None:
        """Writes the model as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Reads what :meth:`save` wrote.

        Raises:
            UsageError: the file is not there or no cost model.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise UsageError(f"{path} holds no costs: {str(error).splitlines()[0]}") from error


def cost_key(candidate: Candidate) -> str:
    return f"{candidate.kind}, {candidate.precision}"


def measure_costs(
    candidates: Sequence[Candidate],
    *,
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
    repeats: int = 5,
    grids: Sequence[Triple] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> CostModel:
    """Times each kind of launch at several sizes, densities and numbers of heads, and fits.

    Args:
        candidates: their kinds and precisions are measured, not they themselves.
        grids: sizes of video in tokens; the default suits the device.
        progress: told what is measured next.
    """
    grids = (GRIDS_GPU if device.type == "cuda" else GRIDS_CPU) if grids is None else grids
    costs = {}
    for key, like in {cost_key(candidate): candidate for candidate in candidates}.items():
        progress(key)
        rows, seconds = [], []
        for grid, heads in itertools.product(grids, HEADS):
            tokens = VideoTokens(grid)
            length = tokens.sequence_length
            q, k, v = (
                torch.randn(1, heads, length, head_dim, device=device, dtype=dtype)
                for _ in range(3)
            )
            for pattern in _two_widths(like.pattern, tokens):
                candidate = Candidate(pattern, like.precision)
                runs = {
                    "run": lambda c=candidate, x=(q, k, v), t=tokens: c.attend(
                        *x, t, backend=backend
                    )
                }
                timing = time_interleaved(runs, device=device, repeats=repeats)["run"]
                rows.append((1.0, heads * length, heads * pattern.density(tokens) * length**2))
                seconds.append(timing.median)
        costs[key] = fit(np.array(rows), np.array(seconds))
    return CostModel(
        machine=device_info(device).name, head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."), costs=costs,
    )  # fmt: skip


def count_pairs(candidates: Sequence[Candidate], head_dim: int = 0) -> CostModel:
    """A cost model that measures nothing: a pair of tokens costs 1 wherever it is computed."""
    cost = Cost(launch=0.0, per_token=0.0, per_pair=1.0)
    return CostModel(
        machine=_PAIRS, head_dim=head_dim, dtype="",
        costs={cost_key(candidate): cost for candidate in candidates},
    )  # fmt: skip


def _two_widths(pattern: Pattern, tokens: VideoTokens) -> list[Pattern]:
    """The same kernels with few pairs and with many, so that pairs and tokens tell apart."""
    if isinstance(pattern, SlidingTile):
        return [SlidingTile(window, pattern.tile) for window in ((1, 1, 1), (2, 3, 3))]
    if isinstance(pattern, VideoSparse):
        return [VideoSparse(top_k_ratio=ratio, tile=pattern.tile) for ratio in (0.1, 0.5)]
    if isinstance(pattern, Radial):
        return [Radial(RadialRule(decay), pattern.block_size) for decay in (0.2, 1.0)]
    return [Dense()]


def fit(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> Cost:
    """Coefficients >= 0 that make the relative errors small, by least squares.

    A coefficient that would be negative is none: it is left out, and the others are fitted again.
    """
    weighted = rows / seconds[:, None]
    kept = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while kept:
        scale = weighted[:, kept].max(0)
        solved = np.linalg.lstsq(weighted[:, kept] / scale, np.ones(len(rows)), rcond=None)[0]
        if (solved >= 0).all():
            found[kept] = solved / scale
            break
        kept.remove(kept[int(solved.argmin())])
    worst = float(np.abs(weighted @ found - 1).max())
    return Cost(launch=found[0], per_token=found[1], per_pair=found[2], worst_fit=worst)
