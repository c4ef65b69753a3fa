"""The setuptools commands behind setup.py, setup_sta.py and setup_vsa.py.

CMake is the only description of the compile. Each component has its own CMake tree below
build/native, shared by all setup files, and becomes `video_attn/_<name>.so`, with a record beside.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import setuptools
from build_checks import (
    BuildError,
    check_cuda,
    check_host_compiler,
    check_setuptools,
    check_thunderkittens,
    check_torch,
    doubt_cuda,
    probe_host_compiler,
    probe_nvcc,
)
from build_install import PACKAGE, PipInstall
from build_plan import (
    ROOT,
    BuildOptions,
    ComponentSpec,
    Planned,
    Tools,
    find_tools,
    make_plan,
)
from build_record import format_table, git_revision, make_record, write_record
from setuptools import Extension
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

try:
    check_setuptools(setuptools.__version__)
    from setuptools.command.bdist_wheel import bdist_wheel  # which old ones lack
except BuildError as error:
    raise SystemExit(f"error: {error}") from None

NATIVE_TREES = ROOT / "build" / "native"


def settings(*default: str) -> dict[str, Any]:
    """The arguments of `setup()` for a setup file that asks for the components `default`.

    No name, version or dependency here: pyproject.toml holds them.
    """
    try:
        options = BuildOptions.from_environment(os.environ)
        tools = find_tools(options)
        plan = make_plan(default, options, tools)
    except BuildError as error:  # inside setup() setuptools would print it like this
        raise SystemExit(f"error: {error}") from None
    NativeBuild.options, NativeBuild.tools, NativeBuild.plan = options, tools, plan
    PipInstall.components = tuple(item.spec.name for item in plan)
    to_build = [item.spec.name for item in plan if item.reason is None]
    return {
        "ext_modules": [Extension(f"{PACKAGE}._{name}", sources=[]) for name in to_build],
        "cmdclass": {
            "build": CleanBuild,
            "build_ext": NativeBuild,
            "bdist_wheel": AnyPythonWheel,
            "install": PipInstall,
        },
    }


class CleanBuild(build):
    """`build` from an empty build/lib, and with build_ext even when it only has reasons to write.

    Wheels and installs take everything they find in build/lib: modules since removed, and the
    libraries of another setup file. The CMake trees stand elsewhere and are kept.
    """

    sub_commands: ClassVar = [
        (name, None if name == "build_ext" else needed) for name, needed in build.sub_commands
    ]

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    """A wheel with components serves every Python 3: their libraries hold no Python symbol.

    The module `_planning` alone is for one interpreter; its file name says so, and the others go
    without it.
    """

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class NativeBuild(build_ext):
    """Build the planned components with CMake and write a record for each of them."""

    options = BuildOptions()  # these three are set by settings(): one process, one setup file
    tools = Tools()
    plan: tuple[Planned, ...] = ()

    def run(self) -> None:
        folder = self.component_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if self.inplace:
            self.run_command("egg_info")  # a tree used in place knows its version by it
        version, revision = self.distribution.get_version(), git_revision(ROOT)
        prepared = {item: self.prepare(item) for item in self.plan if item.reason is None}
        self.warn_of_cuda(prepared)
        records = []
        for item in self.plan:
            if item in prepared:
                definitions, facts = prepared[item]
                facts["architectures"] = self.compile_into(folder, item.spec, definitions)
            else:
                (folder / file_name(item.spec)).unlink(missing_ok=True)
                facts = {"reason": item.reason}
            record = make_record(item.spec.name, version, revision, **facts)
            write_record(folder, record)
            records.append(record)
        atexit.register(print, "\n" + format_table(records), flush=True)

    def warn_of_cuda(self, items: Iterable[Planned]) -> None:
        """Say once what is doubtful about the CUDA toolkit."""
        archs = [arch for item in items for arch in item.cuda_archs]
        doubt = doubt_cuda(probe_nvcc(self.tools.nvcc), archs) if archs else None
        if doubt is not None:
            self.warn(doubt)

    def component_folder(self) -> Path:
        """Where the libraries go: the source tree for an in-place build, else build/lib."""
        if self.inplace:
            return Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        return Path(self.build_lib) / PACKAGE

    def prepare(self, item: Planned) -> tuple[dict[str, str], dict[str, Any]]:
        """Check what the component needs, before anything is compiled.

        Returns:
            The definitions for CMake, and the facts for the record.

        Raises:
            BuildError: a compiler or source tree that is there but unsuitable.
        """
        spec, tools = item.spec, self.tools
        check_torch(tools.torch_version)
        compiler = probe_host_compiler(tools.cxx)
        check_host_compiler(compiler)
        facts = {"compiler": compiler.version, "torch": tools.torch_version}
        definitions = {
            "CMAKE_CXX_COMPILER": shutil.which(tools.cxx) or tools.cxx,
            "VIDEO_ATTN_COMPONENT": spec.name,
            "VIDEO_ATTN_TORCH_DIR": str(tools.torch_dir),
        }
        if spec.is_cuda:
            cuda = probe_nvcc(tools.nvcc)
            check_cuda(spec.name, tools.nvcc, cuda, item.cuda_archs)
            facts["cuda"] = f"{cuda[0]}.{cuda[1]}"
            definitions["CMAKE_CUDA_COMPILER"] = tools.nvcc
            definitions["VIDEO_ATTN_CUDA_ARCHS"] = ";".join(item.cuda_archs)
        if spec.hopper_only:
            check_thunderkittens(spec.name, Path(tools.thunderkittens))
            definitions["VIDEO_ATTN_THUNDERKITTENS_DIR"] = tools.thunderkittens
        if spec.is_module:
            definitions["VIDEO_ATTN_PYTHON_INCLUDE"] = tools.python_include
            definitions["VIDEO_ATTN_MODULE_SUFFIX"] = spec.suffix
        return definitions, facts

    def compile_into(
        self, folder: Path, spec: ComponentSpec, definitions: Mapping[str, str]
    ) -> list[str]:
        """Compile a component with CMake, put it into `folder`, return its architectures.

        The CMake tree is named by its settings, so that a changed setting starts afresh.
        """
        tools, name = self.tools, spec.name
        generator = "Ninja" if tools.ninja else "Unix Makefiles"
        configure = [tools.cmake, "-S", str(ROOT), "-G", generator, "-DCMAKE_BUILD_TYPE=Release"]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={tools.ninja or tools.make}")
        configure += [f"-D{key}={value}" for key, value in definitions.items()]
        configure += shlex.split(self.options.cmake_args)
        identity = hashlib.sha256("\n".join([*configure, tools.torch_version]).encode())
        tree = NATIVE_TREES / f"{name}-{identity.hexdigest()[:12]}"
        jobs = self.options.max_jobs or str(os.cpu_count() or 1)
        try:
            with locked(tree):
                subprocess.run([*configure, "-B", str(tree)], check=True)
                subprocess.run([tools.cmake, "--build", str(tree), "--parallel", jobs], check=True)
                place_library(tree / file_name(spec), folder)
        except subprocess.CalledProcessError as error:
            raise BuildError(
                f"component {name} does not compile (the compiler's own message is above); "
                "VIDEO_ATTN_BUILD_EXT=0 installs without native components"
            ) from error
        return (tree / "architectures.txt").read_text().split(";")

    def get_outputs(self) -> list[str]:
        """Every file that `run` puts into the package."""
        folder = self.component_folder()
        libraries = [file_name(item.spec) for item in self.plan if item.reason is None]
        records = [f"_{item.spec.name}.json" for item in self.plan]
        return [str(folder / name) for name in libraries + records]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # libraries are written where they belong, none is copied from a build folder


def file_name(spec: ComponentSpec) -> str:
    """The file of a component in the package, and in its CMake tree."""
    return f"_{spec.name}{spec.suffix}"


@contextmanager
def locked(tree: Path) -> Iterator[None]:
    """Let one build at a time work in a CMake tree; the others wait and then find it done."""
    tree.mkdir(parents=True, exist_ok=True)
    with open(tree / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def place_library(built: Path, folder: Path) -> None:
    """Copy by replacement: a process that has the old library mapped keeps running with it."""
    temporary = folder / f".{built.name}.new"
    shutil.copy2(built, temporary)
    os.replace(temporary, folder / built.name)
