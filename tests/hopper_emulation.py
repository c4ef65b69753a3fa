"""Builds and loads the host emulation of the Hopper kernels: their own source, run on CPU tensors.

The source is CUDA, so it is translated first, by three rules. A free function that holds PTX is
left out: csrc/hopper/emulation/primitives.h has one of the same name. A launch becomes a call of
launch_blocks(). Shared memory becomes that of the emulated block. What ThunderKittens and the CUDA
headers give, the other headers of csrc/hopper/emulation give here.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from build_plan import ROOT, BuildOptions, Tools, find_tools

FOLDER = ROOT / "build" / "emulation"
KERNELS = ROOT / "csrc" / "hopper"
UNITS = ("sta_forward.cu", "vsa_forward.cu", "sta_backward.cu", "vsa_backward.cu")
BINDING = ROOT / "csrc/bindings/emulation/hopper_emulated.cpp"
FLAGS = (
    "-std=c++20", "-O2", "-ftree-vectorize", "-fPIC", "-fvisibility=hidden",
    "-fno-strict-aliasing",  # as device code, which looks at registers as it likes
    "-U_FORTIFY_SOURCE",  # which takes a jump between the stacks of two fibers for an error
    "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip

_FUNCTION = re.compile(
    r"^(?:template <[^\n]*>\n)?__device__ inline (?:[^\n]*\{[^\n]*\}\n|(?:(?!\}\n)[^\n]*\n)+\}\n)",
    re.MULTILINE,
)
_LAUNCH = re.compile(r"([\w:]+(?:<[\w:, ]*>)?)\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
_STATIC = re.compile(r"__shared__ (?:alignas\(\d+\) )?([\w:<>, ]+?) (\w+)(\[[^\]]*\])?;")


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


def translate(source: str) -> str:
    """CUDA source of csrc/hopper as C++ for the emulation."""

    def without_ptx(match: re.Match[str]) -> str:
        text = match.group()
        return "" if re.search(r"\basm\b|__cvta_", text) else text

    translated = _FUNCTION.sub(without_ptx, source)
    translated = _LAUNCH.sub(r"launch_blocks(\1, \2, \3);", translated)
    translated = _DYNAMIC.sub(r"\1* const \2 = reinterpret_cast<\1*>(shared_memory());", translated)
    translated = _STATIC.sub(r'auto& \2 = shared_variable<\1\3>("\2");', translated)
    if re.search(r"\basm\b|<<<|__shared__", translated):
        raise ValueError("a line of PTX, a launch or shared memory was not understood")
    return translated.replace(
        "#pragma once\n", '#pragma once\n\n#include "hopper/emulation/primitives.h"\n', 1
    )


def _sources() -> list[Path]:
    return sorted([*KERNELS.glob("*.h"), *KERNELS.glob("*.cu")])


def _build() -> Path:
    tools = host_tools()
    parts = [*KERNELS.glob("emulation/*"), *ROOT.glob("csrc/emulation/*.h")]
    parts += [BINDING, *ROOT.glob("csrc/bindings/hopper_*.h"), Path(__file__), *_sources()]
    identity = hashlib.sha256("\n".join([str(tools.cxx), tools.torch_version]).encode())
    for path in sorted(parts):
        identity.update(path.read_bytes())
    name = f"hopper-{identity.hexdigest()[:16]}"
    library = FOLDER / f"{name}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / ".hopper.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(FOLDER / name, library)
    return library


def _compile(folder: Path, library: Path) -> None:
    """Translates into ``folder``, compiles there, and links ``library``."""
    tools = host_tools()
    (folder / "hopper").mkdir(parents=True, exist_ok=True)
    for path in _sources():
        plain = path.name in ("params.h", "launch.h", "config.h", "step_list.h")
        text = path.read_text(encoding="utf-8")
        (folder / "hopper" / path.name).write_text(text if plain else translate(text))
    includes = ["-I", str(folder), "-I", str(KERNELS / "emulation"), "-I", str(ROOT / "csrc")]
    includes += ["-isystem", str(tools.torch_dir) + "/include"]

    def compile_one(source: Path) -> Path:
        built = folder / f"{source.stem}.o"
        _run([str(tools.cxx), *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(built)])
        return built

    units = [*(folder / "hopper" / name for name in UNITS), BINDING]
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, units))
    temporary = library.with_suffix(".new")
    torch_cpu = f"{tools.torch_dir}/lib/libtorch_cpu.so"
    _run([str(tools.cxx), "-shared", *map(str, objects), torch_cpu, "-o", str(temporary)])
    temporary.rename(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
