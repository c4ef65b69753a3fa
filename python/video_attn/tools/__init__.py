"""What the command line calls. Nothing in the library imports this package."""

from __future__ import annotations


class UsageError(ValueError):
    """Options that do not fit together; the message ends in what to do. Exit code 2."""
