"""What a search has measured, in a file: one that was killed goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError

from .. import UsageError


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: str = "video_attn calibrate errors 1"
    # {SHA-256 of a capture: {candidate: errors of its heads 0, 1, ...}}
    captures: dict[str, dict[str, list[NonNegativeFloat]]] = Field(default_factory=dict)


class Memory:
    """Errors of heads, by the hash of their capture and by candidate.

    Args:
        path: a JSON file that is replaced whole after every head; None keeps nothing.

    Raises:
        UsageError: the file is another program's.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._content = _Content()
        if path is not None and path.exists():
            try:
                self._content = _Content.model_validate_json(path.read_text(encoding="utf-8"))
            except (ValidationError, UnicodeDecodeError) as error:
                reason = str(error).splitlines()[0]
                raise UsageError(f"{path} holds no errors of calibrate: {reason}") from error

    def known(self, capture: str, key: str, head: int) -> float | None:
        """The error of a head with a candidate, if it was measured."""
        errors = self._content.captures.get(capture, {}).get(key, [])
        return errors[head] if head < len(errors) else None

    def keep(self, capture: str, keys: Sequence[str], head: int, errors: Sequence[float]) -> None:
        """Keeps the errors of the next ``head`` of a capture, each with its candidate."""
        of_capture = self._content.captures.setdefault(capture, {})
        for key, error in zip(keys, errors, strict=True):
            of_candidate = of_capture.setdefault(key, [])
            assert len(of_candidate) == head
            of_candidate.append(error)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text(self._content.model_dump_json(), encoding="utf-8")
            part.replace(self.path)


def hash_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()
