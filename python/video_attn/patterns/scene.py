"""Scenes of a video, and which of them may see each other: a limit on any pattern over frames.

A video of several shots has boundaries, counted in frames of the decoded video ("pixel" frames) or
in the frames of tokens that attention works on ("latent" frames). An adjacency matrix says which
scene (row, the queries) sees which scene (column, the keys); it need not be symmetric. Text is no
frame: it stays visible both ways.

A latent frame holds several pixel frames, so a boundary may fall inside one. That frame then
belongs to both scenes (seen when either may be seen), to the earlier, or to the later one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..checks import as_int, check_bool, check_int

Matrix = tuple[tuple[bool, ...], ...]
Adjacency = str | Callable[[int, int], bool] | Tensor | Sequence[Sequence[bool]]

CHOICES = {
    "unit": ("pixel", "latent"),
    "straddle": ("both", "earlier", "later"),
    "sink": ("obey", "exempt"),
}


@dataclass(frozen=True)
class Scenes:
    """Scene boundaries and adjacency, and how they meet the frames of tokens. Immutable, hashable.

    Args:
        boundaries: first frame of each scene, starting with 0, and at the end the frame after the
            last scene; strictly increasing. S scenes have S + 1 boundaries. Frames after the last
            boundary belong to the last scene.
        adjacency: S x S booleans, row = the scene that looks, column = the scene that is seen, True
            on the diagonal; or "adjacent" (a scene sees itself and its neighbours), "all", or a
            function ``(query_scene, key_scene) -> bool``.
        unit: what ``boundaries`` counts: "pixel" frames or "latent" frames, those of the tokens.
        straddle: the scene of a latent frame whose pixel frames belong to several: "both" (all of
            them), "earlier" or "later".
        sink: whether the attention sink of a rule must "obey" the adjacency or is "exempt" from it.
        scene_sink: every frame sees the whole first frame of each scene that it may see.
        strict: the last boundary must be the end of the video, not merely inside it.
        temporal_compression: pixel frames per latent frame of the VAE, the first one excepted,
            which holds one. temporal_patch: VAE latents per frame of tokens. padding_latents: VAE
            latents before the video, as CogVideoX 1.5 adds them. For pixel boundaries only; the
            pipeline integrations fill them in.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    boundaries: Sequence[int]
    adjacency: Adjacency = "adjacent"
    unit: str = "pixel"
    straddle: str = "both"
    sink: str = "obey"
    scene_sink: bool = False
    strict: bool = False
    temporal_compression: int = 4
    temporal_patch: int = 1
    padding_latents: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", _as_boundaries(self.boundaries))
        object.__setattr__(self, "adjacency", _as_matrix(self.adjacency, self.num_scenes))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        for name in ("scene_sink", "strict"):
            check_bool(name, getattr(self, name))
        for name, minimum in (
            ("temporal_compression", 1),
            ("temporal_patch", 1),
            ("padding_latents", 0),
        ):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum))
        if self.padding_latents >= self.temporal_patch:
            raise ValueError(
                f"padding_latents must be less than temporal_patch {self.temporal_patch}, "
                f"got {self.padding_latents}"
            )

    @classmethod
    def of_frames(cls, matrix: Tensor | Sequence[Sequence[bool]]) -> Scenes:
        """The level below scenes: T x T booleans, which latent frame sees which."""
        return cls(range(len(matrix) + 1), matrix, unit="latent")

    @property
    def key(self) -> tuple[Any, ...]:
        """The scenes as plain values, in the order of the arguments."""
        return (
            self.boundaries, self.adjacency, self.unit, self.straddle, self.sink, self.scene_sink,
            self.strict, self.temporal_compression, self.temporal_patch, self.padding_latents,
        )  # fmt: skip

    @property
    def num_scenes(self) -> int:
        return len(self.boundaries) - 1

    def membership(self, num_frames: int) -> Tensor:
        """bool [T, S]: which scenes each of ``num_frames`` latent frames belongs to.

        Raises:
            ValueError: a boundary past the video, a scene that gets no frame, or, if ``strict``, a
                last boundary that is not the end of the video.
        """
        spans = torch.tensor([self._span(t) for t in range(num_frames)], device="cpu")
        self._check_end(int(spans[-1, 1]))
        starts = torch.tensor(self.boundaries[:-1], device="cpu")
        ends = torch.tensor([*self.boundaries[1:-1], int(spans[-1, 1])], device="cpu")
        member = (spans[:, :1] < ends) & (spans[:, 1:] > starts)
        if self.straddle != "both":
            numbers = torch.arange(self.num_scenes, device="cpu")
            scene = numbers.where(member, self.num_scenes).amin(1)
            if self.straddle == "later":
                scene = numbers.where(member, -1).amax(1)
            member = scene[:, None] == numbers
        for scene_index in (~member.any(0)).nonzero().flatten().tolist():
            first, end = self.boundaries[scene_index : scene_index + 2]
            raise ValueError(
                f"boundaries: scene {scene_index} ({self.unit} frames {first} to {end - 1}) gets "
                f"none of the {num_frames} latent frames with straddle {self.straddle!r}; "
                "straddle='both' lets scenes share a latent frame"
            )
        return member

    def frame_pairs(self, num_frames: int) -> Tensor:
        """bool [T, T]: which latent frame (row) may see which (column). The diagonal is True."""
        member = self.membership(num_frames).int()
        return member @ torch.tensor(self.adjacency, device="cpu").int() @ member.T > 0

    def restrict(self, windows: Tensor, whole: int, sink_frames: int) -> Tensor:
        """Frame windows [T, T] with -1 where a scene may not be seen, and the sinks of ``sink`` and
        ``scene_sink``.

        Args:
            windows: int [T, T], the window of query frame i into key frame j; -1 sees nothing.
            whole: the window that sees a whole frame.
            sink_frames: how many first frames are the sink of the rule that made ``windows``.
        """
        frames = windows.shape[0]
        allowed = self.frame_pairs(frames)
        windows = windows.masked_fill(~allowed, -1)
        if self.sink == "exempt":
            windows[:, :sink_frames] = whole
        if self.scene_sink:
            first = self.membership(frames).int().argmax(0).unique()
            windows[:, first] = windows[:, first].masked_fill(allowed[:, first], whole)
        return windows

    def density(self, frame_density: Tensor) -> Tensor:
        """float64 [S, S]: the mean of a frame density [T, T] over the frame pairs of two scenes."""
        member = self.membership(frame_density.shape[0]).double()
        frames = member.sum(0)
        return member.T @ frame_density.double() @ member / (frames[:, None] * frames)

    def _span(self, frame: int) -> tuple[int, int]:
        """First frame and end, counted in ``unit``, of a latent frame."""
        if self.unit == "latent":
            return frame, frame + 1
        first = frame * self.temporal_patch - self.padding_latents
        last = first + self.temporal_patch - 1
        # Latent 0 holds pixel frame 0 alone; padding before it counts as that frame.
        start = max(first - 1, -1) * self.temporal_compression + 1
        return max(start, 0), max(last, 0) * self.temporal_compression + 1

    def _check_end(self, end: int) -> None:
        # The VAE rounds the number of pixel frames down to 1 + a multiple of its compression.
        rounding = self.temporal_compression if self.unit == "pixel" else 1
        given = self.boundaries[-1]
        if given >= end + rounding:
            raise ValueError(
                f"boundaries must end within the video of {end} {self.unit} frames, got {given}"
                + ("; are they pixel frames?" if self.unit == "latent" else "")
            )
        if self.strict and given < end:
            raise ValueError(
                f"boundaries must end with {end} {self.unit} frames (strict), got {given}"
            )


def _as_boundaries(value: Sequence[int]) -> tuple[int, ...]:
    if type(value).__module__ == "numpy":
        value = list(value)
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"boundaries must be a sequence of ints, got {value!r}")
    if any(as_int(x) is None for x in value):
        raise TypeError(f"boundaries must be ints, got {list(value)!r}")
    value = [index(x) for x in value]
    rising = all(a < b for a, b in pairwise(value))
    if len(value) < 2 or value[0] != 0 or not rising:
        raise ValueError(
            f"boundaries must be at least two ints that start with 0 and rise, got {list(value)}"
        )
    return tuple(value)


def _as_matrix(value: Adjacency, scenes: int) -> Matrix:
    if isinstance(value, str):
        if value not in ("adjacent", "all"):
            raise ValueError(
                f"adjacency must be 'adjacent', 'all', a matrix or a function, got {value!r}"
            )
        reach = scenes if value == "all" else 1
        return tuple(tuple(abs(i - j) <= reach for j in range(scenes)) for i in range(scenes))
    rows: list[Any]
    if callable(value):
        rows = [[value(i, j) for j in range(scenes)] for i in range(scenes)]
    elif isinstance(value, Tensor):
        rows = value.tolist()
    elif isinstance(value, Sequence):
        rows = [list(row) if isinstance(row, Sequence) else row for row in value]
    else:
        raise TypeError(
            "adjacency must be 'adjacent', 'all', a matrix or a function, got "
            f"{type(value).__name__}"
        )
    if len(rows) != scenes or any(not isinstance(r, list) or len(r) != scenes for r in rows):
        raise ValueError(
            f"adjacency must be {scenes} x {scenes}, one row per scene of boundaries, got {rows}"
        )
    if any(x not in (False, True) for row in rows for x in row):
        raise TypeError(f"adjacency must hold booleans, got {rows}")
    if not all(rows[i][i] for i in range(scenes)):
        raise ValueError(
            f"adjacency must be True on the diagonal: a scene that cannot see itself would leave "
            f"queries without keys, got {rows}"
        )
    return tuple(tuple(bool(x) for x in row) for row in rows)
