"""Which denoising step a call of a transformer belongs to.

A transformer does not know: it is given a timestep. Which timesteps are run, and in which order, a
pipeline and its scheduler know, and several pipelines may share one transformer. So the pipeline
that is running is looked for where it is running: on the call stack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

TRANSFORMERS = ("transformer", "transformer_2")
_NAMES = ("self", "pipe", "pipeline", "components")  # what pipelines are called in their callers
_BF16 = 2.0**-8  # a pipeline may round the timestep that it passes


def denoising_step(
    transformer: Any,
    timestep: Tensor | float,
    *,
    pipe: Any = None,
    timesteps: Sequence[float] | None = None,
) -> tuple[int, int]:
    """(index of the denoising step, number of steps) of a call of ``transformer``.

    Counted are the distinct timesteps that are run: a scheduler that calls the model twice in a
    step (Heun) counts once per timestep, and a video-to-video run counts from where it starts.

    Args:
        transformer: the one that is called. timestep: what it is called with; of timesteps per
            token, the largest is the step's.
        pipe: whose scheduler holds when no pipeline is running. timesteps: the timesteps of a run,
            when there is neither.

    Raises:
        ValueError: nothing tells the timesteps, or ``timestep`` is none of them.
    """
    now = float(torch.as_tensor(timestep).max())
    run = next(_running(transformer), None)
    if run is not None:
        values, current = run
        if current is not None and abs(current - now) <= _BF16 * abs(now):
            now = current  # before any rounding
    elif timesteps is not None:
        values = list(timesteps)
    elif _timesteps(pipe):
        values = _timesteps(pipe)
    else:
        raise ValueError(
            "the schedule has dense steps, but nothing tells which timesteps are run: give "
            "timesteps= to apply(), or run the transformer in a pipeline"
        )
    values = list(dict.fromkeys(float(value) for value in values))
    step = min(range(len(values)), key=lambda i: abs(values[i] - now))
    if abs(values[step] - now) > _BF16 * abs(now):
        raise ValueError(
            f"timestep {now} is none of the {len(values)} timesteps, from {values[0]} to "
            f"{values[-1]}, so the schedule cannot tell the step"
        )
    return step, len(values)


def unwrapped(module: Any) -> Any:
    """A module without the wrapper of torch.compile."""
    return getattr(module, "_orig_mod", module)


def _running(transformer: Any) -> Iterator[tuple[list[float], float | None]]:
    """(timesteps that are run, the current one if known) of pipelines that run ``transformer``,
    the innermost first.
    """
    frame = sys._getframe(2)
    while frame is not None:
        for name in _NAMES:
            if name not in frame.f_code.co_varnames and name not in frame.f_code.co_freevars:
                continue
            owner = frame.f_locals.get(name)
            if not _has_transformer(owner, transformer):
                continue
            values, current = _timesteps(owner), None
            if name == "self":  # its own loop: what it says of the run is of this run
                count = getattr(owner, "_num_timesteps", None)
                if isinstance(count, int) and 0 < count <= len(values):
                    values = values[-count:]
                current = getattr(owner, "_current_timestep", None)
                current = None if current is None else float(torch.as_tensor(current).max())
            if values:
                yield values, current
        frame = frame.f_back  # type: ignore[assignment]


def _has_transformer(owner: Any, transformer: Any) -> bool:
    if owner is None or isinstance(owner, torch.nn.Module):
        return False
    if getattr(owner, "scheduler", None) is None:
        return False
    return any(unwrapped(getattr(owner, name, None)) is transformer for name in TRANSFORMERS)


def _timesteps(pipe: Any) -> list[float]:
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return [] if timesteps is None else torch.as_tensor(timesteps).flatten().tolist()
