"""What a head may be given: patterns of several widths, each in several precisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...functional.patterns import Dense, Pattern, Radial, SlidingTile, VideoSparse
from ...functional.video_tokens import VideoTokens
from ...layout import Triple
from ...patterns.radial import RadialRule
from ...registry import PRECISIONS
from .. import UsageError

KINDS = ("sta", "vsa", "radial", "dense")
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5)
DECAYS = (0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Candidate:
    """A pattern in a precision."""

    pattern: Pattern
    precision: str = "native"

    @property
    def kind(self) -> str:
        """What kernels it runs: "sta 6x8x8", "vsa 4x4x4", "radial 128" or "dense"."""
        if isinstance(self.pattern, (SlidingTile, VideoSparse)):
            name = "sta" if isinstance(self.pattern, SlidingTile) else "vsa"
            return f"{name} {_by(self.pattern.tile)}"
        return f"radial {self.pattern.block_size}" if isinstance(self.pattern, Radial) else "dense"

    @property
    def name(self) -> str:
        """For people, short: "sta 3x3x3", "vsa 0.2", "radial 0.5", "dense", and the precision."""
        if isinstance(self.pattern, SlidingTile):
            text = f"sta {_by(self.pattern.windows[0])}"
        elif isinstance(self.pattern, VideoSparse):
            text = f"vsa {self.pattern.top_k_ratio:g}"
        elif isinstance(self.pattern, Radial):
            rule: Any = self.pattern.rule
            text = f"radial {rule.decay_factor:g}"
        else:
            text = "dense"
        return text if self.precision == "native" else f"{text} {self.precision}"

    @property
    def key(self) -> str:
        """Everything that its output depends on."""
        return f"{self.pattern!r}, {self.precision}"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: VideoTokens, **options: Any
    ) -> Tensor:
        """The attention of [B, H, S, D] heads by this candidate."""
        return self.pattern.attend(query, key, value, tokens, precision=self.precision, **options)


OWN = Candidate(Dense())  # what a model does by itself


def candidates_for(
    tokens: VideoTokens,
    kinds: Sequence[str] = KINDS,
    precisions: Sequence[str] = ("native",),
    *,
    sta_tile: Triple = (6, 8, 8),
    vsa_tile: Triple = (4, 4, 4),
    block_size: int = 128,
    rule: RadialRule | None = None,
) -> list[Candidate]:
    """All candidates of these kinds for a video of ``tokens``; what the model does by itself, dense
    attention in its own precision, is always one of them, the first.

    Args:
        kinds: of "sta", "vsa", "radial" and "dense".
        precisions: of every candidate.
        sta_tile, vsa_tile, block_size: as in the patterns.
        rule: what radial candidates are variants of, in their decay.

    Raises:
        UsageError: a kind or a precision that does not exist.
    """
    _check("patterns", kinds, KINDS)
    _check("precisions", precisions, PRECISIONS)
    patterns: list[Pattern] = []
    if "sta" in kinds:
        patterns += [SlidingTile(w, sta_tile) for w in windows_of(tokens, sta_tile)]
    if "vsa" in kinds:
        patterns += [VideoSparse(top_k_ratio=ratio, tile=vsa_tile) for ratio in RATIOS]
    if "radial" in kinds:
        base = RadialRule() if rule is None else rule
        names = ("decay_factor", "neighbor_fraction", "min_window", "split_width", "sink_frames",
                 "pooling")  # fmt: skip
        fixed = dict(zip(names, base.key, strict=True))
        patterns += [Radial(RadialRule(**fixed | {"decay_factor": d}), block_size) for d in DECAYS]
    if "dense" in kinds:
        patterns.append(Dense())
    found = [Candidate(pattern, precision) for precision in precisions for pattern in patterns]
    return list(dict.fromkeys([OWN, *found]))


def windows_of(tokens: VideoTokens, tile: Triple) -> list[Triple]:
    """Windows of growing size, in tiles: near in all axes, in space alone, in time alone. Those
    that cover the video are left out: dense attention does that.
    """
    tiles = tokens.layout(tile).tile_grid
    whole = max(tiles)
    wanted = [
        *((t, s, s) for t in (1, 3, 5) for s in (1, 3, 5)),
        *((whole, s, s) for s in (1, 3)),
        *((t, whole, whole) for t in (1, 3)),
    ]
    fitted: Iterable[Triple] = (
        (min(t, tiles[0]), min(h, tiles[1]), min(w, tiles[2])) for t, h, w in wanted
    )
    return sorted(set(fitted) - {tiles}, key=lambda window: (_volume(window), window))


def _volume(window: Triple) -> int:
    return window[0] * window[1] * window[2]


def _check(name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    for value in given:
        if value not in allowed:
            raise UsageError(f"{name} must be of {', '.join(allowed)}; got {value!r}")


def _by(triple: Triple) -> str:
    return "x".join(map(str, triple))
