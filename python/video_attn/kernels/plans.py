"""Launches of calls that were seen before: all is known but the tensors, so a call costs little.

A first call plans its launches in Python and lets Triton choose or compile each kernel, by dtype,
constexprs and the alignment of every address. All of that follows from the call's key, which holds
every size, stride, dtype and alignment; so a later call with the same key fills in its tensors and
starts the same compiled kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch, is_temporary

_MOST_PLANS = 1024


class _Planned(NamedTuple):
    """A launch: the compiled kernel for a grid, its arguments, and which of them are tensors.

    Args:
        start: starts the kernel on the current stream. values: arguments, in order.
        slots: (position in values, name of a given tensor or number of a temporary one).
    """

    start: Callable[..., Any]
    values: list[Any]
    slots: list[tuple[int, str | int]]


@dataclass(frozen=True)
class _Plan:
    """The launches of a call, and the (shape, dtype) of the temporary tensors they share."""

    launches: list[_Planned]
    temporaries: list[tuple[torch.Size, torch.dtype]]

    def run(self, addresses: dict[str | int, int], device: torch.device) -> None:
        kept = []  # in memory until all is launched
        for number, (shape, dtype) in enumerate(self.temporaries):
            kept.append(torch.empty(shape, dtype=dtype, device=device))
            addresses[number] = kept[-1].data_ptr()
        for start, values, slots in self.launches:
            # Triton takes an address as it is; a tensor it asks for its own, and then the driver.
            values = values.copy()
            for position, name in slots:
                values[position] = addresses[name]
            start(*values)


_plans: dict[Hashable, _Plan] = {}
_HERE = contextlib.nullcontext()


def run_planned(
    options: tuple[Hashable, ...],
    tensors: Mapping[str, Tensor | None],
    launches: Callable[[], Sequence[Launch]],
) -> None:
    """Runs a call's launches in order on the current stream of the tensors' device.

    Args:
        options: all that ``launches()`` depends on besides the tensors.
        tensors: all tensors of the call, given and resulting. ``launches()`` may use temporary ones
            besides; with any other, a copy say, there is no plan.
    """
    # Triton asks whether 16 divides an address, and nothing else about it.
    key: list[Hashable] = [options]
    addresses: dict[str | int, int] = {}
    for name, x in tensors.items():
        if x is None:
            key.append(None)
            continue
        address = addresses[name] = x.data_ptr()
        key += (x.shape, x.stride(), x.dtype, address % 16)
        device = x.device
    found = list(addresses.values())
    if len(set(found)) < len(found):  # q may be k: then all of this plan's calls have it so
        key.append(tuple(map(found.index, found)))
    key.append(device)
    signature = tuple(key)
    with _on(device):
        plan = _plans.get(signature)
        if plan is not None:
            plan.run(addresses, device)
            return
        made = [launch for launch in launches() if launch.grid > 0]
        compiled = [launch.run() for launch in made]
    if all(x is not None for x in compiled):  # the interpreter compiles nothing
        plan = _plan(made, compiled, tensors)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        if plan is not None:
            _plans[signature] = plan


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which ``device`` is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def _plan(
    made: Sequence[Launch], compiled: Sequence[Any], tensors: Mapping[str, Tensor | None]
) -> _Plan | None:
    """The plan of launches that have run; None if a tensor is neither given nor temporary."""
    given = {id(x): name for name, x in tensors.items() if x is not None}
    temporary: dict[int, tuple[int, Tensor]] = {}
    planned = []
    for launch, kernel in zip(made, compiled, strict=True):
        values = [launch.args[name] for name in launch.kernel.arg_names]
        slots: list[tuple[int, str | int]] = []
        for position, x in enumerate(values):
            if not isinstance(x, Tensor):
                continue
            values[position] = None
            if id(x) in given:
                slots.append((position, given[id(x)]))
                continue
            if not is_temporary(x):
                return None
            number, _ = temporary.setdefault(id(x), (len(temporary), x))
            slots.append((position, number))
        planned.append(_Planned(kernel[(launch.grid, 1, 1)], values, slots))
    return _Plan(planned, [(x.shape, x.dtype) for _, x in temporary.values()])
