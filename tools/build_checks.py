"""What the build refuses, with the remedy: compilers and sources that are there but unsuitable.

Every check is a plain function of facts. The probes that find the facts stand beside them, so the
checks are tested without owning an old compiler.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import PlatformError

# First CUDA toolkit that compiles for each architecture.
CUDA_FOR_ARCH = {
    "80": (11, 0),
    "86": (11, 1),
    "87": (11, 4),
    "89": (11, 8),
    "90": (11, 8),
    "90a": (12, 3),
    "100": (12, 8),
    "100a": (12, 8),
    "103": (12, 9),
    "103a": (12, 9),
    "120": (12, 8),
    "120a": (12, 8),
    "121": (12, 9),
    "121a": (12, 9),
}
CUDA_FOR_CXX20 = (12, 0)
# Toolkits whose ptxas, first and last, can give two left operands of wgmma the same registers.
CUDA_SHARING_OPERANDS = ((12, 4), (13, 0))
OLDEST_TORCH = (2, 10)
OLDEST_SETUPTOOLS = (77, 0, 3)  # reads the metadata of pyproject.toml
SUBMODULE = "third_party/ThunderKittens"
KITTENS_HEADER = "include/kittens.cuh"

CXX20_PROGRAM = """
#include <bit>
#include <concepts>
#include <span>
template <std::integral T> constexpr T twice(T x) { return x + x; }
static_assert(std::bit_cast<unsigned>(1.0f) != 0 && twice(2) == 4);
int main() { int a[2] = {1, 2}; return int(std::span<int>(a).size()) - 2; }
"""


class BuildError(PlatformError):
    """The build stops: the message says what was found, what is needed and how to get it."""


@dataclass(frozen=True)
class HostCompiler:
    command: str
    version: str  # the first line of `--version`
    has_cxx20: bool


@functools.cache
def probe_host_compiler(command: str) -> HostCompiler:
    """Ask the compiler its version and let it compile a small C++20 program."""
    try:
        answer = subprocess.run(
            [command, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"the C++ compiler {command!r} does not run ({error}); set CXX to one that does"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(CXX20_PROGRAM)
        compile_it = [command, "-std=c++20", "-c", str(source), "-o", str(Path(folder) / "probe.o")]
        compiled = subprocess.run(compile_it, capture_output=True).returncode == 0
    return HostCompiler(command, answer.splitlines()[0].strip() if answer else "unknown", compiled)


def check_host_compiler(compiler: HostCompiler) -> None:
    """Refuse a host compiler without C++20, which torch's headers and ThunderKittens need."""
    if compiler.has_cxx20:
        return
    raise BuildError(
        f"the C++ compiler cannot compile C++20: found {compiler.command} ({compiler.version}), "
        "needed g++ 11 or clang 14 or newer.\n"
        "Choose another compiler with CXX, e.g.\n"
        "    sudo apt install g++-11\n"
        "    CXX=g++-11 pip install --no-build-isolation .\n"
        "or install without native components: VIDEO_ATTN_BUILD_EXT=0"
    )


def check_setuptools(version: str) -> None:
    """Refuse a setuptools that does not understand pyproject.toml; pip installs a newer one."""
    if tuple(int(x) for x in re.findall(r"\d+", version)[:3]) < OLDEST_SETUPTOOLS:
        raise BuildError(
            f"setuptools {version} is too old, {'.'.join(map(str, OLDEST_SETUPTOOLS))} or newer is "
            "needed: python -m pip install --upgrade setuptools"
        )


def check_torch(version: str) -> None:
    """Refuse a torch that the package does not run with: pip would replace it after the build."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(
            f"torch is too old: found {version}, needed {needed} or newer.\n"
            f"    pip install 'torch>={needed}'"
        )


def parse_nvcc_version(text: str) -> tuple[int, int]:
    """Read "release 13.0" from the answer of `nvcc --version`."""
    found = re.search(r"release (\d+)\.(\d+)", text)
    if not found:
        raise BuildError(f"nvcc --version gives no release number: {text.strip()[:200]!r}")
    return int(found[1]), int(found[2])


@functools.cache
def probe_nvcc(command: str) -> tuple[int, int]:
    """The CUDA version of an nvcc."""
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"nvcc {command!r} does not run ({error}); set CUDA_HOME to a working toolkit"
        ) from error
    return parse_nvcc_version(answer.stdout)


def check_cuda(component: str, nvcc: str, version: tuple[int, int], archs: Sequence[str]) -> None:
    """Refuse architectures that are unknown or that this CUDA toolkit cannot compile for."""
    for arch in archs:
        if arch not in CUDA_FOR_ARCH:
            raise BuildError(
                f"component {component}: CUDA architecture {arch!r} is unknown; "
                f"VIDEO_ATTN_CUDA_ARCHS may name {', '.join(CUDA_FOR_ARCH)}"
            )
        needed = max(CUDA_FOR_ARCH[arch], CUDA_FOR_CXX20)
        if version < needed:
            raise BuildError(
                f"component {component}: CUDA is too old for sm_{arch}: found "
                f"{version[0]}.{version[1]} ({nvcc}), needed {needed[0]}.{needed[1]} or newer.\n"
                "Choose another toolkit with CUDA_HOME, e.g.\n"
                f"    export CUDA_HOME=/usr/local/cuda-{needed[0]}.{needed[1]}\n"
                "or other architectures with VIDEO_ATTN_CUDA_ARCHS, or leave the CUDA components "
                "out: VIDEO_ATTN_COMPONENTS=cpu"
            )


def doubt_cuda(version: tuple[int, int], archs: Sequence[str]) -> str | None:
    """A warning for a CUDA toolkit whose code for sm_90a needs a second look, or None."""
    first, last = CUDA_SHARING_OPERANDS
    if "90a" not in archs or not first <= version <= last:
        return None
    return (
        f"ptxas of CUDA {version[0]}.{version[1]} is known to give an operand of a tensor core "
        "product that stays in registers to another product (wrong results on H100 and H200; "
        f"{first[0]}.{first[1]} to {last[0]}.{last[1]} do). These kernels are written so that it "
        "does not; after a change of them run tests/hopper/test_wgmma_operands.py, or build with a "
        "newer toolkit"
    )


def thunderkittens_dir(root: Path, override: str) -> Path:
    """The checkout of ThunderKittens: THUNDERKITTENS_ROOT, otherwise the submodule."""
    return Path(override).absolute() if override else root / SUBMODULE


def check_thunderkittens(component: str, folder: Path) -> None:
    """Refuse an empty or missing checkout before the compiler does in its own words."""
    if (folder / KITTENS_HEADER).is_file():
        return
    raise BuildError(
        f"component {component}: ThunderKittens is not in {folder} (no {KITTENS_HEADER}).\n"
        "Fetch the submodule:\n"
        f"    git submodule update --init {SUBMODULE}\n"
        "or set THUNDERKITTENS_ROOT to a checkout, or leave the CUDA components out: "
        "VIDEO_ATTN_COMPONENTS=cpu"
    )
