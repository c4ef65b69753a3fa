"""CaptureWriter: keeps q, k, v of chosen attention calls while a model runs.

After every capture the folder is whole: captures appear under their names when they are complete,
and the index is replaced in one step. A process that dies leaves what it had. A disk that fills
up ends the capture, not the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import Capture, Facts, file_name, save_capture

RESERVE = 64 << 20  # bytes that captures leave free on the disk, for the video and its record


@dataclass(frozen=True)
class Selection:
    """Which calls are kept: every ``every``-th of the given layers and steps (None: all), at most
    ``max_captures`` of them (0: all).
    """

    max_captures: int = 10
    layers: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    every: int = 1

    def passes(self, layer: int | None, step: int | None) -> bool:
        """Whether a call of this layer and step is one of those that are counted."""
        return (self.layers is None or layer in self.layers) and (
            self.steps is None or step in self.steps
        )

    def planned(self, layers: int, steps: int) -> int:
        """How many captures a run of so many layers and steps gives."""
        kept_layers = layers if self.layers is None else sum(n < layers for n in self.layers)
        kept_steps = steps if self.steps is None else sum(n < steps for n in self.steps)
        calls = -(-kept_layers * kept_steps // self.every)
        return min(calls, self.max_captures) if self.max_captures else calls


class CaptureWriter:
    """Writes captures of one kernel into ``folder``; those of that kernel from before are replaced.

    Attributes:
        total_calls: calls that were offered. saved: files written. failure: why capturing ended
            before its time, or None.
    """

    def __init__(
        self, folder: Path, kernel: str, selection: Selection, file_format: str = "safetensors"
    ) -> None:
        self.folder, self.kernel, self.selection = folder, kernel, selection
        self.file_format = file_format
        self.total_calls = self._passed = 0
        self.saved: list[dict[str, Any]] = []
        self.failure: str | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.replaced = self._remove_earlier()

    @property
    def is_full(self) -> bool:
        """Whether no further call is kept."""
        limit = self.selection.max_captures
        return self.failure is not None or bool(limit and len(self.saved) >= limit)

    def offer(self, q: Tensor, k: Tensor, v: Tensor, facts: Facts) -> None:
        """Keeps q, k, v [B, H, S, D] if this call is one of the selection. Never raises OSError."""
        call_idx = self.total_calls
        self.total_calls += 1
        if self.is_full or not self.selection.passes(facts.layer, facts.step):
            return
        self._passed += 1
        if (self._passed - 1) % self.selection.every:
            return
        facts = facts.model_copy(update={"kernel": self.kernel, "call_idx": call_idx})
        try:
            self._require_space(sum(x.numel() * x.element_size() for x in (q, k, v)))
            q, k, v = (x.detach().cpu().contiguous() for x in (q, k, v))
            capture = Capture(q, k, v, facts)
            name = file_name(self.kernel, call_idx, self.file_format)
            save_capture(capture, self.folder / name)
            self.saved.append(_entry(name, capture))
            self._write_index()
        except OSError as error:
            self.failure = str(error)

    def close(self) -> None:
        """Writes the index a last time, with all calls counted."""
        try:
            self._write_index()
        except OSError as error:
            self.failure = self.failure or str(error)

    def _require_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < nbytes + RESERVE:
            raise OSError(
                f"{self.folder} has {free / 1e6:,.0f} MB free, a capture takes {nbytes / 1e6:,.0f} "
                f"MB and {RESERVE / 1e6:.0f} MB stay free for the video"
            )

    def index(self) -> dict[str, Any]:
        """What the index files hold."""
        shapes: dict[str, list[int]] = {}
        for entry in self.saved:
            key = str((*(tuple(entry[f"{name}_shape"]) for name in "qkv"), entry["dtype"]))
            shapes.setdefault(key, []).append(entry["call_idx"])
        return {
            "kernel_name": self.kernel,
            "total_calls": self.total_calls,
            "saved_count": len(self.saved),
            "max_captures": self.selection.max_captures or None,
            "captured_shapes": shapes,
            "captures": self.saved,
            "failure": self.failure,
        }

    def _write_index(self) -> None:
        index, stem = self.index(), f"{self.kernel}_metadata"
        text = json.dumps(index, indent=1) + "\n"
        _replace(self.folder / f"{stem}.json", lambda path: path.write_text(text, "utf-8"))
        if self.file_format == "pt":
            _replace(self.folder / f"{stem}.pt", lambda path: torch.save(index, path))

    def _remove_earlier(self) -> int:
        """Removes what an earlier run left of this kernel; returns the number of captures."""
        captures = _ours(self.folder, self.kernel, "*")
        for path in (*captures, *self.folder.glob(f".{self.kernel}_*.part")):
            path.unlink(missing_ok=True)
        for suffix in ("json", "pt"):
            (self.folder / f"{self.kernel}_metadata.{suffix}").unlink(missing_ok=True)
        return len(captures)


def _ours(folder: Path, kernel: str, suffix: str) -> list[Path]:
    return [
        path
        for path in folder.glob(f"{kernel}_input_*.{suffix}")
        if path.suffix in (".pt", ".safetensors") and path.stem.rpartition("_")[2].isdecimal()
    ]


def _entry(name: str, capture: Capture) -> dict[str, Any]:
    shapes = {f"{n}_shape": list(getattr(capture, n).shape) for n in "qkv"}
    return {
        "file": name, "dtype": str(capture.q.dtype), **shapes, "bytes": capture.nbytes,
        **capture.facts.model_dump(),
    }  # fmt: skip


def _replace(path: Path, write: Any) -> None:
    """Writes beside ``path``, then puts that in its place."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    except RuntimeError as error:  # how torch reports a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def capture_bytes(shapes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    """Bytes of one capture with tensors of these ``shapes``."""
    total = 0
    for shape in shapes:
        count = 1
        for n in shape:
            count *= n
        total += count * itemsize
    return total
