"""Which backend runs a problem, and why the others do not: Problem, Backend, select(), why_not().

``supports(problem)`` needs no device, so the capabilities of every GPU can be tested on a CPU.
Authority: ``backend=`` of a call, then :func:`use_backend`, then ``VIDEO_ATTN_BACKEND``, then
priority. A backend that was asked for by name and cannot serve raises; nothing falls back in
silence.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .device import device_info
from .quantize import QUANTIZED_PRECISIONS, QuantizationOptions

if TYPE_CHECKING:
    from .calls import BackwardCall, BlockOps, ForwardCall

logger = logging.getLogger("video_attn")

BACKEND_VARIABLE = "VIDEO_ATTN_BACKEND"
PRECISIONS = ("native", *QUANTIZED_PRECISIONS)
Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Problem:
    """Everything that decides which kernel can run, and nothing else: no tensors, hashable.

    Args:
        direction: "forward" or "backward".
        device_type: "cpu" or "cuda". arch: "cpu", "sm_90", "gfx942", ...
        dtype: of q, k and v. head_dim: of q and k. head_dim_v: of v.
        q_block_size, kv_block_size: of the mask; None for dense attention.
        is_causal: dense causal attention. precision: one of ``PRECISIONS``.
        quantization: the options of a quantized precision; None for "native", and for the defaults.
    """

    direction: Direction
    device_type: str
    arch: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    q_block_size: int | None = None
    kv_block_size: int | None = None
    is_causal: bool = False
    precision: str = "native"
    quantization: QuantizationOptions | None = None

    @classmethod
    def of(
        cls,
        direction: Direction,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        head_dim_v: int,
        q_block_size: int | None = None,
        kv_block_size: int | None = None,
        is_causal: bool = False,
        precision: str = "native",
        quantization: QuantizationOptions | None = None,
    ) -> Problem:
        """The problem of these plain values on ``device``, whose type and architecture it looks up.

        Kept: every call asks for one.
        """
        return _problem(
            direction, device, dtype, head_dim, head_dim_v, q_block_size, kv_block_size,
            is_causal, precision, quantization,
        )  # fmt: skip

    @property
    def is_sparse(self) -> bool:
        return self.kv_block_size is not None


@lru_cache(maxsize=1024)
def _problem(direction: Direction, device: torch.device, *fields: Any) -> Problem:
    info = device_info(device)
    return Problem(direction, info.type, info.arch, *fields)


@dataclass(frozen=True)
class Backend:
    """A row of the backend table.

    Args:
        name: as in ``backend=``. priority: among those that can serve, the highest runs.
        available: None when the backend can run on this machine at all, else one sentence that says
            why not.
        supports: None when it can serve the problem, else one sentence with the value and the
            limit.
        forward: what runs a :class:`~video_attn.calls.ForwardCall`; returns (out, lse).
        backward: what runs a :class:`~video_attn.calls.BackwardCall`; returns (dq, dk, dv). None
            for a backend without a backward pass.
        forward_in_order: ``forward`` for a mask whose tokens lie elsewhere in q, k, v and out, by a
            table int32 [tokens of the mask], -1 for padding; returns out. None: they are moved.
        block_ops: its means of blocks and its top-k; None leaves them to the other backends.
        built: for a backend of several components, None when the one that serves the problem is
            here, else one sentence that says how to build it.
    """

    name: str
    priority: int
    available: Callable[[], str | None]
    supports: Callable[[Problem], str | None]
    forward: Callable[[ForwardCall], tuple[Tensor, Tensor]]
    backward: Callable[[BackwardCall], tuple[Tensor, Tensor, Tensor]] | None = None
    forward_in_order: Callable[[ForwardCall, Tensor], Tensor] | None = None
    built: Callable[[Problem], str | None] | None = None
    block_ops: BlockOps | None = None

    def refusal(self, problem: Problem) -> str | None:
        """Why this backend does not serve ``problem`` here; None when it does.

        What no install can change comes first: nobody shall build kernels that cannot serve.
        """
        if problem.direction == "backward" and self.backward is None:
            return "has no backward pass"
        reason = self.supports(problem) or self.available()
        if reason is None and self.built is not None:
            reason = self.built(problem)
        return reason


@dataclass(frozen=True)
class Verdict:
    """One line of :func:`why_not`: ``reason`` is None for a backend that can serve."""

    backend: str
    reason: str | None
    chosen: bool


_backends: dict[str, Backend] = {}
_dependent: list[Callable[[], object]] = []
_override: ContextVar[str | None] = ContextVar("video_attn_backend", default=None)


def register(backend: Backend) -> None:
    """Adds a backend to the table; a second one of the same name is an error."""
    if backend.name in _backends:
        raise ValueError(f"backend {backend.name!r} is registered already")
    _backends[backend.name] = backend
    forget_choices()


def forget_choices() -> None:
    """Asks the backends again from here on: they, or what they answer, have changed."""
    for choice in (_select, _select_block_ops, serving):
        choice.cache_clear()
    for forget in _dependent:
        forget()


def when_choices_change(forget: Callable[[], object]) -> None:
    """``forget`` is called by :func:`forget_choices`: for what is kept by others and follows from
    choices.
    """
    _dependent.append(forget)


def backends() -> list[Backend]:
    """All backends, highest priority first."""
    return sorted(_backends.values(), key=lambda b: -b.priority)


def check_backend_name(name: str, source: str = "backend") -> str:
    """``name`` if it is a backend's, else TypeError or ValueError that lists them."""
    if not isinstance(name, str):
        raise TypeError(f"{source} must be the name of a backend, got {name!r}")
    if name not in _backends:
        allowed = ", ".join(b.name for b in backends())
        raise ValueError(f"{source} must be one of {allowed}; got {name!r}")
    return name


def serves_backward(name: str) -> bool:
    """Whether the backend has a backward pass at all."""
    return _backends[name].backward is not None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend for the calls inside; one that cannot serve a call raises there.

    The backward pass belongs to its call, wherever it runs later. Compiled code asks at every run
    instead: there, run the backward pass inside as well.
    """
    token = _override.set(check_backend_name(name))
    try:
        yield
    finally:
        _override.reset(token)


def context_backend() -> str | None:
    """The backend that :func:`use_backend` forces here."""
    return _override.get()


def forced_backend(explicit: str | None = None) -> tuple[str, str] | None:
    """(backend, who asked for it) by the order of authority, or None for the automatic choice."""
    environment = os.environ.get(BACKEND_VARIABLE) or None
    for name, source in (
        (explicit, "backend= or use_backend()"),
        (context_backend(), "use_backend()"),
        (environment, BACKEND_VARIABLE),
    ):
        if name is not None:
            return check_backend_name(name, source), source
    return None


def select(problem: Problem, explicit: str | None = None) -> Backend:
    """The backend that runs ``problem``.

    Raises:
        ValueError: a forced backend does not exist. RuntimeError: the forced backend, or every
            backend, refuses; the message holds the whole table.
    """
    forced = forced_backend(explicit)
    return _select(problem, *(forced or (None, None)))


@lru_cache(maxsize=1024)
def _select(problem: Problem, forced: str | None, source: str | None) -> Backend:
    if forced is not None:
        reason = _backends[forced].refusal(problem)
        if reason is None:
            return _backends[forced]
        raise RuntimeError(
            f"backend {forced!r}, asked for by {source}, cannot serve: {reason}\n{explain(problem)}"
        )
    for backend in backends():
        if backend.refusal(problem) is None:
            if backend.name == "reference" and len(_backends) > 1:
                logger.warning(
                    "attention runs on the slow torch reference, because:\n%s", explain(problem)
                )
            return backend
    raise RuntimeError(f"no backend can serve:\n{explain(problem)}")


def select_block_ops(device: torch.device, explicit: str | None = None) -> BlockOps:
    """The block means and top-k for a device: of the forced backend, where it has some and they run
    there, else of the best one.
    """
    forced = forced_backend(explicit)
    return _select_block_ops(device, None if forced is None else forced[0])


@lru_cache(maxsize=64)
def _select_block_ops(device: torch.device, forced: str | None) -> BlockOps:
    arch = device_info(device).arch
    rows = sorted(backends(), key=lambda backend: backend.name != forced)
    reasons: list[str] = []
    for backend in rows:
        if backend.block_ops is None:
            continue
        reason = backend.block_ops.refusal(device.type, arch)
        if reason is None:
            if backend.name == "reference" and device.type == "cuda" and forced != "reference":
                logger.warning("block means and top-k run in plain torch: %s", "; ".join(reasons))
            return backend.block_ops
        reasons.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"no backend has block means for {device}:\n" + "\n".join(reasons))


def why_not(problem: Problem) -> list[Verdict]:
    """Every backend, highest priority first, with the reason why it does not serve ``problem``."""
    verdicts, chosen = [], False
    for backend in backends():
        reason = backend.refusal(problem)
        verdicts.append(Verdict(backend.name, reason, reason is None and not chosen))
        chosen = chosen or reason is None
    return verdicts


@lru_cache(maxsize=1024)
def serving(problem: Problem) -> tuple[str, ...]:
    """Names of the backends that can serve ``problem``, highest priority first."""
    return tuple(verdict.backend for verdict in why_not(problem) if verdict.reason is None)


def explain(problem: Problem) -> str:
    """:func:`why_not` as text, the problem first."""
    lines = [f"  {problem}"]
    lines += [f"  {v.backend}: {v.reason or 'can serve'}" for v in why_not(problem)]
    return "\n".join(lines)
