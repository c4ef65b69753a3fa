"""A copy of the source tree to build in, with a small stand-in for the native sources."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = shutil.ignore_patterns(
    ".*_cache", ".git", ".venv", ".hypothesis", "__pycache__", "*.egg-info", "*.so", "_*.json",
    "build", "dist",
)  # fmt: skip

CPU_SOURCE = """
#include <torch/library.h>
TORCH_LIBRARY_FRAGMENT(video_attn_stand_in, m) { m.def("answer() -> int", [] { return 42L; }); }
"""


def copy_tree(folder: Path) -> Path:
    """Copy what a checkout holds, without what builds and tests left in it."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND, ignore_dangling_symlinks=True)
    return tree


def put_source(tree: Path, name: str, text: str = "// stand-in\n") -> None:
    """Write one native source below csrc."""
    path = tree / "csrc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run_setup(
    tree: Path,
    *arguments: str,
    script: str = "setup.py",
    limit: float | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a setup file of `tree` with this Python; the caller looks at returncode and stdout.

    After `limit` seconds it raises subprocess.TimeoutExpired.
    """
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tree,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )


def script(path: Path, text: str) -> str:
    """An executable shell script that stands for a compiler."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)
