"""Whether a result is right, before anybody times it."""

from __future__ import annotations

from torch import Tensor


class WrongResultError(RuntimeError):
    """A result failed its check: it is not timed."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| over |expected|, both as Euclidean norms in fp64."""
    expected = expected.double()
    norm = expected.norm()
    return float((got.double() - expected).norm() / norm) if norm > 0 else float(got.norm())


def require_correct(name: str, got: Tensor, expected: Tensor, limit: float) -> float:
    """The relative error of ``got``, if it is finite and at most ``limit``.

    Raises:
        WrongResultError: it is not. There is nothing to time then.
    """
    error = relative_error(got, expected)
    if not error <= limit:  # NaN too
        raise WrongResultError(
            f"{name}: relative error {error:.2e} is above {limit:.2e}: not timed"
        )
    return error
