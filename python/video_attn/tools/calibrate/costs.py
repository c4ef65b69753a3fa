"""What a launch of each candidate takes on this machine: a model, fitted to measurements.

seconds = launch + heads · (tokens · per_token + pairs · per_pair), with the pairs of tokens that a
head computes. The first is what a launch costs however small, the second what is done to every
token (moving it to tile order, quantizing), the third the attention itself. A layer whose heads
part ways pays tokens · heads · per_parted_token more: q, k, v and the output are moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ...device import device_info
from ...functional.head_groups import HeadGroup, HeadGroups, LayerPattern
from ...functional.patterns import Dense, Pattern, Radial, SlidingTile, VideoSparse
from ...functional.video_tokens import VideoTokens
from ...layout import Triple
from ...patterns.radial import RadialRule
from .. import UsageError
from ..bench.record import versions
from ..bench.timing import time_interleaved
from .candidates import Candidate

GRIDS_GPU: tuple[Triple, ...] = ((6, 32, 32), (18, 48, 48))
GRIDS_CPU: tuple[Triple, ...] = ((4, 8, 8), (4, 12, 16), (8, 16, 16))
HEADS_GPU, HEADS_CPU = (4, 16), (1, 4)  # two heads of a video may fit in the cache of a GPU
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
        machine: its name. head_dim, dtype, grids, backend: what was measured; backend None: the
            best of the machine for each.
        costs: by :attr:`Candidate.kind` and precision, as "sta 6x8x8, native".
        per_parted_token: seconds for each token of each head of a layer whose heads part ways.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    machine: str
    head_dim: int
    dtype: str
    costs: dict[str, Cost]
    backend: str | None = None
    per_parted_token: float = Field(default=0.0, ge=0)
    grids: list[Triple] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)

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

    def parting(self, tokens: VideoTokens, heads: int) -> float:
        """What a layer of so many heads pays when they do not all have one candidate."""
        return heads * tokens.sequence_length * self.per_parted_token

    def _cost(self, candidate: Candidate) -> Cost:
        key = cost_key(candidate)
        if key not in self.costs:
            raise UsageError(
                f"the costs hold no {key!r}, only {', '.join(sorted(self.costs))}; measure them "
                "with --measure-costs"
            )
        return self.costs[key]

    def check(self, head_dim: int, dtype: torch.dtype, backend: str | None) -> None:
        """Raises UsageError where something else was measured than what is to be predicted."""
        asked = {
            "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch."), "backend": backend,
        }  # fmt: skip
        differ = [
            f"{name} {getattr(self, name)}, not {value}"
            for name, value in asked.items()
            if getattr(self, name) != value
        ]
        if differ and not self.is_count:
            raise UsageError(
                f"the costs were measured for {'; '.join(differ)}: measure them again, with "
                "--measure-costs"
            )

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
    heads: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> CostModel:
    """Times each kind of launch at several sizes, densities and numbers of heads, and fits.

    Args:
        candidates: their kinds and precisions are measured, not they themselves.
        grids: sizes of video in tokens; the default suits the device. On a GPU add the size that
            is to be predicted: what is near to what was measured is predicted best.
        heads: numbers of heads. progress: told what is measured next.
    """
    gpu = device.type == "cuda"
    grids = list(dict.fromkeys(grids or (GRIDS_GPU if gpu else GRIDS_CPU)))
    heads = heads or (HEADS_GPU if gpu else HEADS_CPU)

    def time(pattern: LayerPattern, tokens: VideoTokens, count: int, precision: str) -> float:
        q, v = (_waves(tokens, count, head_dim, device, dtype) for _ in "qv")
        k = q.clone()

        def run() -> Tensor:
            return pattern.attend(q, k, v, tokens, precision=precision, backend=backend)

        return time_interleaved({"run": run}, device=device, repeats=repeats)["run"].median

    costs = {}
    for key, like in {cost_key(candidate): candidate for candidate in candidates}.items():
        progress(key)
        rows, seconds = [], []
        for grid, count in itertools.product(grids, heads):
            tokens = VideoTokens(grid)
            length = tokens.sequence_length
            for pattern in _widths(like.pattern, tokens):
                rows.append((1.0, count * length, count * pattern.density(tokens) * length**2))
                seconds.append(time(pattern, tokens, count, like.precision))
        costs[key] = fit(np.array(rows), np.array(seconds))
    progress("heads that part ways")
    tokens, count = VideoTokens(grids[-1]), max(heads)
    together, apart = (time(p, tokens, count, "native") for p in _apart(count))
    return CostModel(
        machine=device_info(device).name, head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."), backend=backend, costs=costs, grids=grids,
        versions=versions(),
        per_parted_token=max(0.0, apart - together) / (count * tokens.sequence_length),
    )  # fmt: skip


def _waves(
    tokens: VideoTokens, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[1, heads, S, head_dim], laid out as models do: random waves over the video, which make
    neighbours alike.

    With q = k of them, the tiles that video sparse attention picks lie together, as in videos. Of
    noise they would lie anywhere, and reading them takes a GPU longer.
    """
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in tokens.grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    speed = torch.randn(3, heads * head_dim, device=device) / 8.0  # radians per token
    waves = (places @ speed).cos_().to(dtype)
    return waves.unflatten(1, (heads, head_dim))[None].transpose(1, 2)


def _apart(heads: int) -> tuple[LayerPattern, LayerPattern]:
    """One pattern in one launch for all heads, and in three: neighbouring heads, which are a view,
    and two groups of every other one, which are copies.
    """
    pattern = SlidingTile((1, 1, 1))
    last = max(2, heads - heads // 3)
    groups = [range(0, last, 2), range(1, last, 2), range(last, heads)]
    return pattern, HeadGroups([HeadGroup(group, pattern) for group in groups if len(group) > 0])


def count_pairs(candidates: Sequence[Candidate], head_dim: int = 0) -> CostModel:
    """A cost model that measures nothing: a pair of tokens costs 1 wherever it is computed."""
    cost = Cost(launch=0.0, per_token=0.0, per_pair=1.0)
    return CostModel(
        machine=_PAIRS, head_dim=head_dim, dtype="",
        costs={cost_key(candidate): cost for candidate in candidates},
    )  # fmt: skip


def _widths(pattern: Pattern, tokens: VideoTokens) -> list[Pattern]:
    """The same kernels with few pairs and with many, so that pairs and tokens tell apart."""
    if isinstance(pattern, SlidingTile):
        windows = ((1, 1, 1), (2, 3, 3), (3, 5, 5))
        return [SlidingTile(window, pattern.tile) for window in windows]
    if isinstance(pattern, VideoSparse):
        return [VideoSparse(top_k_ratio=ratio, tile=pattern.tile) for ratio in (0.05, 0.2, 0.5)]
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
