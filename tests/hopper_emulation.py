"""Builds and loads the host emulation of the Hopper kernels: their own source, run on CPU tensors.

The source compiles as C++: what PTX does, and launches, csrc/emulation/primitives.h and
csrc/hopper/emulation/primitives.h do here; what ThunderKittens and the CUDA headers give, the other
headers of csrc/hopper/emulation.
"""

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
from build_plan import ROOT, BuildOptions, Tools, find_tools

FOLDER = ROOT / "build" / "emulation"
UNITS = (
    *sorted((ROOT / "csrc/hopper").glob("*.cu")),
    ROOT / "csrc/bindings/emulation/hopper_emulated.cpp",
)
FLAGS = (
    "-std=c++20", "-O2", "-ftree-vectorize", "-fPIC", "-fvisibility=hidden",
    "-fno-strict-aliasing",  # as device code, which looks at registers as it likes
    "-U_FORTIFY_SOURCE",  # which takes a jump between the stacks of two fibers for an error
    "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip


def host_tools() -> Tools:
    return find_tools(BuildOptions.from_environment(os.environ))


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    return None if host_tools().cxx else "no C++ compiler"


@functools.cache
def load() -> ctypes.CDLL:
    """The emulation, built when its sources have changed; registers hopper_* for CPU tensors."""
    library = _build()
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


@contextlib.contextmanager
def options(
    late_copies: bool = True, late_products: bool = True, last_first: bool = False
) -> Iterator[None]:
    """Sets emulation::Options (csrc/emulation/block.h) for the calls inside."""
    set_options = load().hopper_emulation_options
    set_options.argtypes = [ctypes.c_bool] * 3
    set_options(late_copies, late_products, last_first)
    try:
        yield
    finally:
        set_options(True, True, False)


def _build() -> Path:
    tools = host_tools()
    identity = hashlib.sha256("\n".join([str(tools.cxx), tools.torch_version, *FLAGS]).encode())
    headers = (ROOT / "csrc" / folder for folder in ("hopper", "device", "emulation"))
    parts = [path for folder in headers for path in folder.rglob("*.*h")]
    parts += [*UNITS, *ROOT.glob("csrc/bindings/hopper_*.h")]
    for path in sorted(parts):
        identity.update(path.read_bytes())
    library = FOLDER / f"hopper-{identity.hexdigest()[:16]}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / ".hopper.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    tools = host_tools()
    includes = ["-I", str(ROOT / "csrc/hopper/emulation"), "-I", str(ROOT / "csrc")]
    includes += ["-isystem", str(tools.torch_dir) + "/include"]

    def compile_one(source: Path) -> Path:
        built = library.with_suffix(f".{source.stem}.o")
        _run([str(tools.cxx), *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(built)])
        return built

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, UNITS))
    temporary = library.with_suffix(".new")
    torch_cpu = f"{tools.torch_dir}/lib/libtorch_cpu.so"
    _run([str(tools.cxx), "-shared", *map(str, objects), torch_cpu, "-o", str(temporary)])
    for built in objects:
        built.unlink()
    temporary.rename(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
