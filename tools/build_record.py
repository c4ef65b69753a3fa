"""The record kept beside each native component, and the table that closes a build.

A record holds no date and no path, so that the same sources give the same files.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def git_revision(root: Path) -> str | None:
    """The commit of the tree, with "-dirty" after local changes; None outside our own checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # an unpacked sdist inside somebody else's repository
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def make_record(
    component: str,
    version: str,
    revision: str | None,
    *,
    reason: str | None = None,
    architectures: Sequence[str] = (),
    compiler: str | None = None,
    torch: str | None = None,
    cuda: str | None = None,
) -> Record:
    """The facts of one component; `reason` says why it was not built."""
    return {
        "component": component,
        "built": reason is None,
        "reason": reason,
        "version": version,
        "git_revision": revision,
        "architectures": list(architectures),
        "compiler": compiler,
        "torch": torch,
        "cuda": cuda,
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write `_<component>.json` into `folder`."""
    path = folder / f"_{record['component']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def read_records(folder: Path) -> list[Record]:
    """All records in `folder`, by component."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("_*.json"))]


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Component, built or not, architectures, why not: the last thing a build prints.

    A reason is "what; remedy". The remedies follow the table, so that each is said once.
    """
    rows = [("component", "built", "architectures", "why not")]
    remedies: dict[str, None] = {}
    for record in records:
        what, _, remedy = (record["reason"] or "").partition("; ")
        architectures = " ".join(record["architectures"]) or "-"
        rows.append((record["component"], "yes" if record["built"] else "no", architectures, what))
        if remedy:
            remedies[f"{what}: {remedy}"] = None
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["native components of video-attn"]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join([*lines, *remedies])
