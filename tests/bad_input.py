"""How wrong input is tested: one row per mistake, one check for all of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import pytest

from video_attn import registry


@dataclass(frozen=True)
class Refused:
    """A call that must be refused.

    Args:
        name: the mistake in words. call: makes it.
        error: ValueError or TypeError, exactly. argument: its name, as the message must give it.
        given: the wrong value or shape, as the message must give it.
    """

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    argument: str
    given: str

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


def check_refused(row: Refused) -> None:
    """The call raises, names the argument and what was given, and no kernel has run."""
    with no_kernel_may_run(), pytest.raises((ValueError, TypeError)) as caught:
        row.call()
    message = str(caught.value)
    assert type(caught.value) is row.error, f"{type(caught.value).__name__}: {message}"
    assert re.search(rf"(?<!\w){re.escape(row.argument)}(?!\w)", message), message
    assert row.given in message, message


@contextlib.contextmanager
def no_kernel_may_run() -> Iterator[None]:
    """Every backend fails the test when it is called."""

    def ran(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a kernel ran on input that should have been refused")

    real = dict(registry._backends)
    with pytest.MonkeyPatch.context() as patch:
        for name, backend in real.items():
            patch.setitem(registry._backends, name, replace(backend, forward=ran, backward=ran))
        registry.forget_choices()
        try:
            yield
        finally:
            registry.forget_choices()
