"""What a build makes: the native components, the wishes from the environment, and what is absent.

Two kinds of trouble are told apart. Something *absent* (no torch, no nvcc, no compiler) leaves a
component out, with the reason in the closing table and in the package. Something *unsuitable*
(a compiler too old, CUDA too old, an empty submodule) stops the build: see build_checks.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from build_checks import KITTENS_HEADER, SUBMODULE, BuildError, thunderkittens_dir

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = ("auto", "0", "1")
NO_SOURCES = "no sources in this version"


@dataclass(frozen=True)
class ComponentSpec:
    """One native library of the package: `_<name>.so`, or a Python module `_<name>.<tag>.so`."""

    name: str
    entry: str  # the sources that implement the operators; without them there is no component
    cuda_archs: tuple[str, ...] = ()  # default architectures; empty for a component without CUDA
    hopper_only: bool = False  # written with ThunderKittens for exactly these architectures
    is_module: bool = False  # a Python module, for the interpreter it is compiled for

    @property
    def is_cuda(self) -> bool:
        return bool(self.cuda_archs)

    @property
    def suffix(self) -> str:
        """How the file name ends; other interpreters do not pick up a module of this one."""
        return str(sysconfig.get_config_var("EXT_SUFFIX")) if self.is_module else ".so"

    def has_sources(self, root: Path) -> bool:
        return any(root.glob(self.entry))


COMPONENTS = {
    spec.name: spec
    for spec in (
        ComponentSpec("cpu", "csrc/cpu/*.cpp"),
        ComponentSpec("sta", "csrc/bindings/sta*.cpp", ("90a",), hopper_only=True),
        ComponentSpec("vsa", "csrc/bindings/vsa*.cpp", ("90a",), hopper_only=True),
        ComponentSpec("sage", "csrc/bindings/sage*.cpp", ("80", "89", "90a")),
        ComponentSpec("planning", "csrc/bindings/planning.cpp", is_module=True),
    )
}


@dataclass(frozen=True)
class BuildOptions:
    """Every environment variable the build reads, read once.

    `VIDEO_ATTN_BUILD_EXT` is auto (leave out what cannot be built), 0 (build nothing) or 1 (what
    cannot be built is an error); `VIDEO_ATTN_COMPONENTS` and `VIDEO_ATTN_CUDA_ARCHS` replace the
    default lists. The others are the names that compilers, CMake and ThunderKittens already use.
    """

    switch: str = "auto"
    components: tuple[str, ...] = ()
    cuda_archs: tuple[str, ...] = ()
    cxx: str = ""
    cuda_compiler: str = ""
    cuda_home: str = ""
    thunderkittens: str = ""
    max_jobs: str = ""
    cmake_args: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> BuildOptions:
        """Read and check the variables.

        Raises:
            BuildError: a value that is not allowed; the message names the variable.
        """
        switch = environment.get("VIDEO_ATTN_BUILD_EXT") or "auto"
        if switch not in SWITCHES:
            raise BuildError(f"VIDEO_ATTN_BUILD_EXT is {switch!r}; allowed: {', '.join(SWITCHES)}")
        components = split_list(environment.get("VIDEO_ATTN_COMPONENTS", ""))
        unknown = [name for name in components if name not in COMPONENTS]
        if unknown:
            raise BuildError(
                f"VIDEO_ATTN_COMPONENTS names {', '.join(unknown)}; "
                f"allowed: {', '.join(COMPONENTS)}"
            )
        max_jobs = environment.get("MAX_JOBS", "")
        if max_jobs and not (max_jobs.isdecimal() and int(max_jobs) > 0):
            raise BuildError(f"MAX_JOBS is {max_jobs!r}; allowed: a positive whole number")
        return cls(
            switch=switch,
            components=components,
            cuda_archs=split_list(environment.get("VIDEO_ATTN_CUDA_ARCHS", "")),
            cxx=environment.get("CXX", ""),
            cuda_compiler=environment.get("CUDACXX", ""),
            cuda_home=environment.get("CUDA_HOME", ""),
            thunderkittens=environment.get("THUNDERKITTENS_ROOT", ""),
            max_jobs=max_jobs,
            cmake_args=environment.get("CMAKE_ARGS", ""),
        )


@dataclass(frozen=True)
class Tools:
    """What was found on the machine; an empty string or None stands for "absent"."""

    cmake: str = ""
    ninja: str = ""
    make: str = ""
    cxx: str = ""
    nvcc: str = ""
    torch_dir: Path | None = None
    torch_version: str = ""
    system: str = "Linux"
    python_include: str = ""
    thunderkittens: str = ""


@dataclass(frozen=True)
class Planned:
    """A component that was asked for: for which architectures, and why not (None: it is built)."""

    spec: ComponentSpec
    reason: str | None
    cuda_archs: tuple[str, ...] = ()


def split_list(text: str) -> tuple[str, ...]:
    """Split on commas, semicolons and spaces, and drop repetitions."""
    return tuple(dict.fromkeys(text.replace(",", " ").replace(";", " ").split()))


def find_program(name: str) -> str | None:
    """A program beside the running Python (where pip puts cmake and ninja), otherwise in PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def find_tools(options: BuildOptions, which: Callable[[str], str | None] = find_program) -> Tools:
    """Look for compilers, CMake and torch without running or importing any of them."""
    torch_dir, torch_version = None, ""
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is not None and torch_spec.submodule_search_locations:
        torch_dir = Path(torch_spec.submodule_search_locations[0])
        torch_version = importlib.metadata.version("torch")
    return Tools(
        cmake=which("cmake") or "",
        ninja=which("ninja") or "",
        make=which("make") or "",
        cxx=options.cxx or which("c++") or which("g++") or which("clang++") or "",
        nvcc=find_nvcc(options, which),
        torch_dir=torch_dir,
        torch_version=torch_version,
        system=platform.system(),
        python_include=find_header("Python.h", sysconfig.get_path("include")),
        thunderkittens=find_thunderkittens(ROOT, options.thunderkittens),
    )


def find_header(name: str, folder: str) -> str:
    """`folder` if it holds the header."""
    return folder if (Path(folder) / name).is_file() else ""


def find_thunderkittens(root: Path, override: str) -> str:
    """The checkout named by THUNDERKITTENS_ROOT (whatever it holds), or the submodule if filled."""
    folder = thunderkittens_dir(root, override)
    return str(folder) if override or (folder / KITTENS_HEADER).is_file() else ""


def find_nvcc(options: BuildOptions, which: Callable[[str], str | None]) -> str:
    """CUDACXX, then CUDA_HOME/bin, then PATH: the order of CMake and torch."""
    if options.cuda_compiler:
        return which(options.cuda_compiler) or ""
    if options.cuda_home:
        return which(str(Path(options.cuda_home) / "bin" / "nvcc")) or ""
    return which("nvcc") or ""


def absent(spec: ComponentSpec, tools: Tools) -> str | None:
    """Say in one sentence what the machine lacks to build `spec`, or None."""
    if tools.system != "Linux":
        return f"native components are built on Linux only, this is {tools.system}"
    if tools.torch_dir is None:
        return (
            "torch is not importable in the build environment; install torch first, then run "
            "pip install --no-build-isolation ."
        )
    if not tools.cmake:
        return "cmake not found; pip install cmake ninja"
    if not tools.ninja and not tools.make:
        return "neither ninja nor make found; pip install ninja"
    if not tools.cxx:
        return "no C++ compiler found; install g++ 11 or newer, or set CXX"
    if spec.is_cuda and not tools.nvcc:
        return "nvcc not found; install the CUDA toolkit and set CUDA_HOME (Triton serves instead)"
    if spec.hopper_only and not tools.thunderkittens:
        return (
            f"ThunderKittens is not in {SUBMODULE}; git submodule update --init {SUBMODULE}, or "
            "set THUNDERKITTENS_ROOT to a checkout (Triton serves instead)"
        )
    if spec.is_module and not tools.python_include:
        return "Python.h not found; install Python's development files (python3-dev)"
    return None


def choose_archs(spec: ComponentSpec, options: BuildOptions) -> tuple[str, ...]:
    """The architectures asked for, as far as the kernels of `spec` can serve them."""
    asked = options.cuda_archs or spec.cuda_archs
    return tuple(arch for arch in asked if not spec.hopper_only or arch in spec.cuda_archs)


def plan_component(spec: ComponentSpec, options: BuildOptions, tools: Tools, root: Path) -> Planned:
    """Decide whether `spec` is built, and if not, why.

    Raises:
        BuildError: VIDEO_ATTN_BUILD_EXT=1 and something needed is absent.
    """
    if not spec.has_sources(root):
        return Planned(spec, NO_SOURCES)
    if options.switch == "0":
        return Planned(spec, "VIDEO_ATTN_BUILD_EXT=0")
    reason = absent(spec, tools)
    if reason and options.switch == "1":
        raise BuildError(f"component {spec.name}, and VIDEO_ATTN_BUILD_EXT=1: {reason}")
    archs = choose_archs(spec, options) if spec.is_cuda else ()
    if spec.is_cuda and not archs:
        reason = f"its kernels are for {' '.join(spec.cuda_archs)}, VIDEO_ATTN_CUDA_ARCHS is not"
    return Planned(spec, reason, archs)


def make_plan(
    default: tuple[str, ...], options: BuildOptions, tools: Tools, root: Path = ROOT
) -> tuple[Planned, ...]:
    """Plan the components of a setup file, or those of VIDEO_ATTN_COMPONENTS."""
    names = options.components or default
    return tuple(plan_component(COMPONENTS[name], options, tools, root) for name in names)
