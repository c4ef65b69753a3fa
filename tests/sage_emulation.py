"""Builds and loads the host emulation of the Sage kernels: their own source, run on CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from build_plan import ROOT, BuildOptions, find_tools

SOURCES = [
    *sorted((ROOT / "csrc/sage").glob("*.cu")),
    ROOT / "csrc/bindings/emulation/sage_emulated.cpp",
]
FLAGS = [
    "-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden",
    "-ffp-contract=off",  # what is one rounding and what is two, the source says
    "-Wno-unknown-pragmas",  # unroll
    "-U_FORTIFY_SOURCE",  # which takes a jump between the stacks of two fibers for an error
    "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    return None if find_tools(BuildOptions.from_environment(os.environ)).cxx else "no C++ compiler"


@functools.cache
def load() -> ctypes.CDLL:
    """The emulation, built when its sources have changed; registers sage_* for CPU tensors."""
    library = _build()
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


_settings: tuple[int, bool, bool, bool] = (89, True, True, False)


def capability() -> int:
    """What the launcher takes the device for."""
    return _settings[0]


@contextlib.contextmanager
def options(
    capability: int | None = None,
    late_copies: bool = True,
    late_products: bool = True,
    last_first: bool = False,
) -> Iterator[None]:
    """Sets emulation::Options (csrc/emulation/block.h) for the calls inside."""
    before = _settings
    chosen = before[0] if capability is None else capability
    _set((chosen, late_copies, late_products, last_first))
    try:
        yield
    finally:
        _set(before)


def _set(settings: tuple[int, bool, bool, bool]) -> None:
    global _settings
    set_options = load().sage_emulation_options
    set_options.argtypes = [ctypes.c_int, ctypes.c_bool, ctypes.c_bool, ctypes.c_bool]
    set_options(*settings)
    _settings = settings


def _build() -> Path:
    tools = find_tools(BuildOptions.from_environment(os.environ))
    headers = [
        *sorted(ROOT.glob("csrc/sage/**/*.h")),
        *sorted(ROOT.glob("csrc/device/*.h")),
        *sorted(ROOT.glob("csrc/emulation/*.h")),
        ROOT / "csrc/bindings/sage_operators.h",
    ]
    identity = hashlib.sha256("\n".join([tools.cxx, tools.torch_version, *FLAGS]).encode())
    for path in [*SOURCES, *headers]:
        identity.update(path.read_bytes())
    folder = ROOT / "build/emulation"
    library = folder / f"sage-{identity.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(tools.cxx, Path(str(tools.torch_dir)), library)
    return library


def _compile(cxx: str, torch_dir: Path, library: Path) -> None:
    def compile_one(source: Path) -> Path:
        built = library.with_suffix(f".{source.stem}.o")
        includes = ["-I", str(ROOT / "csrc"), "-isystem", str(torch_dir / "include")]
        _run([cxx, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(built)])
        return built

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    temporary = library.with_suffix(".new")
    torch_cpu = torch_dir / "lib/libtorch_cpu.so"
    _run([cxx, "-shared", *map(str, objects), str(torch_cpu), "-o", str(temporary)])
    for built in objects:
        built.unlink()
    temporary.rename(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
