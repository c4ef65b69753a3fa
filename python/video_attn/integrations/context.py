"""What one call of a model knows, for the modules inside it: state that travels with the call.

Two threads may run one transformer at once, on videos of different sizes, in different steps. So
nothing of a call is ever written on a module; it is kept in the thread, under the module (or
handle) that it is for. Code that torch.compile traces may read it: the compiled code is guarded on
what it read, per thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

States = dict[int, Any]


class _Local(threading.local):
    def __init__(self) -> None:
        self.states: States = {}


class _Traced:
    """What hooks that are traced themselves have entered; None outside of them."""

    states: States | None = None


_local, _traced = _Local(), _Traced()


def enter_call(owner: object, state: object) -> States | None:
    """From now on, in this thread, ``call_state(owner)`` is ``state``."""
    entered = {**_states(), id(owner): state}
    if torch.compiler.is_compiling():
        before, _traced.states = _traced.states, entered
        return before
    before, _local.states = _local.states, entered
    return before


def leave_call(token: States | None) -> None:
    """What was before the :func:`enter_call` that gave ``token``."""
    if torch.compiler.is_compiling():
        _traced.states = token
    else:
        _local.states = token or {}


def call_state(owner: object) -> Any:
    """The state of the running call of ``owner``, or None outside of one."""
    return _states().get(id(owner))


@contextlib.contextmanager
def call(owner: object, state: object) -> Iterator[None]:
    """:func:`enter_call` for the length of a ``with``."""
    token = enter_call(owner, state)
    try:
        yield
    finally:
        leave_call(token)


def _states() -> States:
    if torch.compiler.is_compiling() and _traced.states is not None:
        return _traced.states
    return _local.states
