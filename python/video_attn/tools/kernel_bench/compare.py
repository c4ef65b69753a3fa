"""Is a kernel right? Its output against exact attention, row by row, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cases import Case

_SCORES = 1 << 26  # fp32 scores held at a time: 268 MB
_ROWS = 1 << 16  # rows that are compared in fp64 at a time
_KEYS = 1 << 16  # keys that are turned to fp32 at a time


@dataclass
class Statistics:
    """Sums over all compared elements, in fp64, and what follows from them.

    ``worst_row`` is the smallest cosine of a row (one query of one head) of the reference.
    """

    count: int = 0
    squared_error: float = 0.0
    absolute_error: float = 0.0
    max_error: float = 0.0
    product: float = 0.0
    worst_row: float = 1.0
    sides: dict[str, Side] = field(default_factory=lambda: {"reference": Side(), "kernel": Side()})

    def add(self, got: Tensor, expected: Tensor) -> None:
        """Rows [rows, D] of both."""
        got, expected = got.double(), expected.double()
        error = (got - expected).abs()
        self.count += error.numel()
        self.squared_error += float((error**2).sum())
        self.absolute_error += float(error.sum())
        self.max_error = _max(self.max_error, float(error.max()))
        self.product += float((got * expected).sum())
        self.sides["reference"].add(expected)
        self.sides["kernel"].add(got)
        norms = got.norm(dim=-1) * expected.norm(dim=-1)
        cosines = (got * expected).sum(-1) / norms
        # A row of zeros has no direction: two such rows agree, one alone does not.
        both_zero = (got == 0).all(-1) & (expected == 0).all(-1)
        cosines = torch.where(norms == 0, both_zero.double(), cosines)
        self.worst_row = _min(self.worst_row, float(cosines.min()))

    @property
    def relative_l2(self) -> float:
        norm = self.sides["reference"].squares
        if math.isnan(self.squared_error):
            return math.nan
        return math.sqrt(self.squared_error / norm) if norm else math.sqrt(self.squared_error)

    @property
    def cosine(self) -> float:
        norms = self.sides["reference"].squares * self.sides["kernel"].squares
        return self.product / math.sqrt(norms) if norms else float(self.squared_error == 0)

    @property
    def mean_error(self) -> float:
        return self.absolute_error / self.count

    def as_dict(self) -> dict[str, float]:
        return {
            "relative_l2": self.relative_l2, "cosine": self.cosine,
            "worst_row_cosine": self.worst_row, "max_abs_error": self.max_error,
            "mean_abs_error": self.mean_error,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """What -print_compare_stats prints."""
        for name, side in self.sides.items():
            yield (
                f"  {name:9}  min {side.low:.6e}  max {side.high:.6e}  "
                f"mean {side.total / self.count:.6e}  std {side.std(self.count):.6e}"
            )
        spread = math.sqrt(max(0.0, self.squared_error / self.count - self.mean_error**2))
        yield (
            f"  absolute error  mean {self.mean_error:.6e}  max {self.max_error:.6e}  "
            f"std {spread:.6e}"
        )
        yield (
            f"  relative L2 {self.relative_l2:.6e}  cosine {self.cosine:.8f}  "
            f"worst row {self.worst_row:.8f}"
        )


@dataclass
class Side:
    """Sums over one of the two outputs."""

    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    def add(self, x: Tensor) -> None:
        self.low, self.high = _min(self.low, float(x.min())), _max(self.high, float(x.max()))
        self.total += float(x.sum())
        self.squares += float((x**2).sum())

    def std(self, count: int) -> float:
        return math.sqrt(max(0.0, self.squares / count - (self.total / count) ** 2))


def _max(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a


def _min(a: float, b: float) -> float:
    return b if math.isnan(b) or b < a else a


@dataclass(frozen=True)
class Bound:
    """What an output must keep: at most this relative L2 error, at least these cosines."""

    relative_l2: float
    cosine: float
    worst_row: float

    def plus(self, other: Bound) -> Bound:
        """For a reference that is not exact either: the two errors have nothing in common."""
        return Bound(
            math.hypot(self.relative_l2, other.relative_l2),
            self.cosine + other.cosine - 1,
            self.worst_row + other.worst_row - 1,
        )

    def broken_by(self, found: Statistics) -> str:
        """What is out of bounds, "" if nothing is. NaN is."""
        reasons = []
        if not found.relative_l2 <= self.relative_l2:
            reasons.append(f"relative L2 {found.relative_l2:.2e} > {self.relative_l2:.2e}")
        if not found.cosine >= self.cosine:
            reasons.append(f"cosine {found.cosine:.5f} < {self.cosine:.5f}")
        if not found.worst_row >= self.worst_row:
            reasons.append(f"worst row {found.worst_row:.4f} < {self.worst_row:.4f}")
        return ", ".join(reasons)


# By precision. Zeros have relative L2 1 and cosine 0, a flipped sign 2 and -1: neither passes.
EXACT = Bound(0.0, 1.0, 1.0)
BOUNDS = {
    "native": Bound(0.02, 0.999, 0.98),
    "sage_fp16": Bound(0.06, 0.998, 0.95),
    "sage_fp8": Bound(0.10, 0.995, 0.90),
    "fp8": Bound(0.25, 0.97, 0.70),
}


@torch.no_grad()
def compare(
    out: Tensor,
    case: Case,
    qkv: tuple[Tensor, Tensor, Tensor],
    *,
    reference: Tensor | None = None,
    rows: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Statistics:
    """Statistics of ``out`` [B, Hq, Sq, Dv] against ``reference``, or against exact attention.

    Exact attention is computed in fp32, some rows at a time: it never holds more than half a
    gigabyte beyond its inputs.

    Args:
        rows: this many query rows of each head, evenly spread; default all.
        advance: called after each head.
    """
    q, k, v = qkv
    found = Statistics()
    picked = torch.arange(q.shape[2])
    if rows is not None and rows < q.shape[2]:
        picked = torch.linspace(0, q.shape[2] - 1, rows).round().long()
    picked = picked.to(q.device)
    group = q.shape[1] // k.shape[1]
    chunk = max(1, min(_ROWS, _SCORES // k.shape[2]))
    scale = q.shape[3] ** -0.5 if case.scale is None else case.scale
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for part in picked.split(chunk):
                if reference is not None:
                    expected = reference[b, h, part]
                else:
                    expected = _exact(
                        q[b, h, part], k[b, h // group], v[b, h // group], scale,
                        part + (k.shape[2] - q.shape[2]) if case.is_causal else None,
                    )  # fmt: skip
                found.add(out[b, h, part], expected)
            advance()
    return found


def _exact(q: Tensor, k: Tensor, v: Tensor, scale: float, last_key: Tensor | None) -> Tensor:
    """Attention of rows q [rows, D] over all keys in fp32; ``last_key``: that each row sees."""
    scores = torch.empty(len(q), len(k), device=q.device)
    queries = q.float() * scale
    starts = range(0, len(k), _KEYS)
    for start in starts:
        keys = slice(start, start + _KEYS)
        torch.mm(queries, k[keys].float().T, out=scores[:, keys])
    if last_key is not None:
        places = torch.arange(len(k), device=q.device)
        scores.masked_fill_(places > last_key[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    scores.sub_(top).exp_()
    total = scores.sum(-1, keepdim=True)
    out = torch.zeros(len(q), v.shape[1], device=q.device)
    for start in starts:
        keys = slice(start, start + _KEYS)
        out.addmm_(scores[:, keys], v[keys].float())
    return out / total.clamp(min=torch.finfo(torch.float32).tiny)
