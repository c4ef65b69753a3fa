"""The inputs of a benchmark: random tensors of given sizes, or captures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import UsageError
from ..capture import Facts, find_captures, load_capture

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SEED = 20


@dataclass(frozen=True)
class Sizes:
    """Of q [B, Hq, Sq, D], k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv]."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int

    def flops(self, is_causal: bool) -> float:
        """2 · B · Hq · Sq · Sk · (D + Dv); causal: half of it."""
        pairs = self.q_len * self.kv_len * (0.5 if is_causal else 1.0)
        return 2.0 * self.batch * self.heads * pairs * (self.head_dim + self.head_dim_v)

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}:{self.kv_heads}"
        length = str(self.q_len) if self.q_len == self.kv_len else f"{self.q_len}:{self.kv_len}"
        dim = (
            str(self.head_dim)
            if self.head_dim == self.head_dim_v
            else f"{self.head_dim}:{self.head_dim_v}"
        )
        return f"{self.batch}x{heads}x{length}x{dim}"


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Args:
        name: for tables. sizes, dtype: of the tensors. scale: of the scores, None for 1/sqrt(D).
        make: gives q, k, v in "bhsd" on a device; called once per case, so that only one is held.
        source: where it came from, for the record ("file", "layer", "step").
    """

    name: str
    sizes: Sizes
    dtype: torch.dtype
    is_causal: bool
    scale: float | None
    make: Callable[[torch.device], tuple[Tensor, Tensor, Tensor]]
    source: dict[str, Any] = field(default_factory=dict)


def random_case(sizes: Sizes, dtype: torch.dtype, is_causal: bool) -> Case:
    """Normally distributed inputs, the same ones every time on the same kind of device."""

    def make(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(SEED)
        q, k, v = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype)
            for shape in (
                (sizes.batch, sizes.heads, sizes.q_len, sizes.head_dim),
                (sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.head_dim),
                (sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.head_dim_v),
            )
        )
        return q, k, v

    return Case(str(sizes), sizes, dtype, is_causal, None, make)


def captured_cases(
    folder: Path, layout: str | None, is_causal: bool, limit: int | None, every: int
) -> list[Case]:
    """The captures in ``folder``, every ``every``-th of them, at most ``limit``.

    Only their sizes are read now; the tensors are mapped and read when their turn comes.

    Raises:
        CaptureError: no captures, or a broken one.
        UsageError: ``is_causal`` and a capture say different things.
    """
    paths = find_captures(folder)[::every][:limit]
    return [_captured_case(path, layout, is_causal) for path in paths]


def _captured_case(path: Path, layout: str | None, is_causal: bool) -> Case:
    capture = load_capture(path, layout).as_bhsd()
    facts, (q, k, v) = capture.facts, (capture.q, capture.k, capture.v)
    if is_causal and not facts.is_causal:
        raise UsageError(f"-causal: {path.name} was captured without a causal mask; leave it out")
    if facts.mask != "none":
        raise UsageError(
            f"{path.name} was captured with an attn_mask ({facts.mask}), which benchmarks do not "
            "serve; leave it out of the folder"
        )
    (batch, heads, q_len, head_dim), (_, kv_heads, kv_len, head_dim_v) = q.shape, v.shape
    sizes = Sizes(batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v)
    del capture, q, k, v  # only mapped until now

    def make(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        again = load_capture(path, layout).as_bhsd()
        q, k, v = (x.to(device) for x in (again.q, again.k, again.v))
        return q, k, v

    dtype = load_capture(path, layout).q.dtype
    return Case(path.stem, sizes, dtype, facts.is_causal, facts.scale, make, _source(path, facts))


def _source(path: Path, facts: Facts) -> dict[str, Any]:
    return {"file": path.name, "layer": facts.layer, "step": facts.step}


def check_sizes(names: Sequence[str], values: Sequence[int | None]) -> list[int]:
    """The values, if all are there.

    Raises:
        UsageError: the missing ones are named.
    """
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise UsageError(
            f"random inputs need -b, -hq, -sq and -d: {', '.join(missing)} is missing; or give "
            "--shapes, or --load_captured"
        )
    return [value for value in values if value is not None]
