"""Registers, spills and shared memory of the compiled GPU kernels, from the compiled objects.

Triton keeps what it compiled; the numbers stand in those objects, on NVIDIA and on AMD. The CUDA
components are libraries, which the toolkit's cuobjdump reads (the triton package brings one).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ... import native

_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_AMD = {
    "registers": re.compile(r"\.vgpr_count:\s+(\d+)"),
    "spills": re.compile(r"\.vgpr_spill_count:\s+(\d+)"),
}


class Usage(NamedTuple):
    """What one thread (registers, spilled registers or bytes) or block (shared bytes) takes."""

    kernel: str
    variant: str
    registers: int
    spills: str
    shared: int


def triton_usage() -> list[Usage]:
    """Every Triton kernel of this package that this process has compiled."""
    found = []
    for module in _kernel_modules():
        for name, function in vars(module).items():
            caches = getattr(function, "device_caches", None)
            if caches is not None and function.fn.__module__ == module.__name__:
                found += [
                    usage_of(name, compiled)
                    for cache in caches.values()
                    for compiled in _compiled(cache)
                ]
    return found


def _kernel_modules() -> list[ModuleType]:
    package = __name__.split(".")[0]
    return [m for n, m in sorted(sys.modules.items()) if n.startswith(f"{package}.kernels.")]


def _compiled(cache: Any) -> Iterator[Any]:
    """The kernels of a device's cache: the first of its parts, whatever else it holds."""
    kernels = cache[0] if isinstance(cache, tuple) else cache
    yield from kernels.values()


def usage_of(name: str, compiled: Any) -> Usage:
    """Of one compiled Triton kernel."""
    metadata = compiled.metadata
    variant = f"{metadata.num_warps} warps, {metadata.num_stages} stages"
    assembly = compiled.asm.get("amdgcn")
    if assembly is not None:
        numbers = {k: int(m[1]) if (m := p.search(assembly)) else 0 for k, p in _AMD.items()}
        return Usage(name, variant, numbers["registers"], str(numbers["spills"]), metadata.shared)
    return Usage(name, variant, compiled.n_regs, str(compiled.n_spills), metadata.shared)


def library_usage(backend: str, arch: str) -> list[Usage] | str:
    """Every kernel for ``arch`` ("sm_90") in the library of a CUDA backend, or why not."""
    components = {"cuda_sage": ("sage",), "hopper": ("sta", "vsa")}[backend]
    disassembler = find_cuobjdump()
    if disassembler is None:
        return "cuobjdump not found: it comes with the CUDA toolkit and with the triton package"
    found = []
    for name in components:
        if not native.component(name).loaded:
            continue
        library = Path(native.__file__).with_name(f"_{name}.so")
        done = subprocess.run(
            [disassembler, "-res-usage", str(library)], capture_output=True, text=True
        )
        if done.returncode:
            return f"cuobjdump cannot read {library.name}: {done.stderr.strip()[:200]}"
        found += parse_usage(done.stdout, arch)
    return found


def parse_usage(text: str, arch: str) -> list[Usage]:
    """From what cuobjdump prints, the kernels of one architecture ("sm_90" has those of sm_90a)."""
    found = []
    for part in re.split(r"^Fatbin elf code:", text, flags=re.MULTILINE):
        built = re.search(r"^arch = (sm_\d+)", part, re.MULTILINE)
        if built is None or built[1] != arch:
            continue
        usages = _USAGE.findall(part)
        names = readable([usage[0] for usage in usages])
        for name, (_, registers, stack, shared, local) in zip(names, usages, strict=True):
            kernel, _, variant = name.partition("<")
            spills = f"{int(stack) + int(local)} bytes"
            found.append(Usage(kernel, variant, int(registers), spills, int(shared)))
    return found


def readable(symbols: Sequence[str]) -> list[str]:
    """C++ names without namespaces and parameters; as they are where there is no c++filt."""
    program = shutil.which("c++filt")
    if program is None or not symbols:
        return list(symbols)
    done = subprocess.run(
        [program, "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    return [re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", line) for line in lines]


def find_cuobjdump() -> str | None:
    """From PATH, or from the triton package."""
    folders = os.get_exec_path()
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        package = Path(triton.submodule_search_locations[0])
        folders.append(str(package / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))
