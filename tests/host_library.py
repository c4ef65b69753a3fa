"""Compiles C++ that only tests need, for the CPU: operators registered for CPU tensors."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from build_plan import ROOT, BuildOptions, Tools, find_tools

FLAGS = (
    "-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden",
    "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip
FOLDER = ROOT / "build" / "emulation"


def host_tools() -> Tools:
    return find_tools(BuildOptions.from_environment(os.environ))


def cuda_headers() -> Path | None:
    """A folder with cuda_runtime_api.h: that of the CUDA toolkit, or the one inside Triton."""
    folders = []
    nvcc = host_tools().nvcc
    if nvcc:
        folders.append(Path(nvcc).resolve().parents[1] / "include")
    triton = find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        package = Path(triton.submodule_search_locations[0])
        folders.append(package / "backends" / "nvidia" / "include")
    return next((f for f in folders if (f / "cuda_runtime_api.h").is_file()), None)


def build(name: str, source: Path, headers: Sequence[Path], includes: Sequence[Path]) -> Path:
    """The library of ``source``, compiled again when it or one of its headers has changed."""
    tools = host_tools()
    torch_dir = Path(str(tools.torch_dir))
    command = [tools.cxx, *FLAGS, "-I", str(ROOT / "csrc")]
    for folder in (torch_dir / "include", *includes):
        command += ["-isystem", str(folder)]
    identity = hashlib.sha256("\n".join([*command, tools.torch_version]).encode())
    for path in (source, *headers):
        identity.update(path.read_bytes())
    library = FOLDER / f"{name}-{identity.hexdigest()[:16]}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            temporary = library.with_suffix(".new")
            torch_cpu = torch_dir / "lib" / "libtorch_cpu.so"
            command += [str(source), str(torch_cpu), "-o", str(temporary)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            temporary.rename(library)
    return library
