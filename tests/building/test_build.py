"""The build's decisions, its error messages and its records, function by function."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import build_checks
import build_ext
import build_install
import build_plan
import build_record
import pytest
from build_checks import BuildError
from build_plan import COMPONENTS, BuildOptions, Tools, find_tools
from build_tree import ROOT, put_source, script

TOOLS = Tools(
    cmake="/bin/cmake", ninja="/bin/ninja", make="/bin/make", cxx="/bin/c++", nvcc="/bin/nvcc",
    torch_dir=Path("/torch"), torch_version="2", python_include="/python", thunderkittens="/tk",
)  # fmt: skip


def options(**environment: str) -> BuildOptions:
    return BuildOptions.from_environment(environment)


@pytest.fixture
def sources(tmp_path):
    """A tree with sources for every component."""
    put_source(tmp_path, "cpu/attention.cpp")
    for name in ("sta", "vsa", "sage", "planning"):
        put_source(tmp_path, f"bindings/{name}.cpp")
    return tmp_path


# --- Environment -------------------------------------------------------------------------------


def test_defaults_of_the_options():
    assert options() == BuildOptions()
    assert options().switch == "auto"
    assert options(VIDEO_ATTN_BUILD_EXT="").switch == "auto"


def test_every_variable_is_read():
    read = options(
        VIDEO_ATTN_BUILD_EXT="1",
        VIDEO_ATTN_COMPONENTS="cpu,sta cpu",
        VIDEO_ATTN_CUDA_ARCHS="90a;80, 89",
        CXX="g++-13",
        CUDACXX="/c/nvcc",
        CUDA_HOME="/cuda",
        THUNDERKITTENS_ROOT="/tk",
        MAX_JOBS="3",
        CMAKE_ARGS="-DA=1",
    )
    assert read == BuildOptions(
        "1", ("cpu", "sta"), ("90a", "80", "89"), "g++-13", "/c/nvcc", "/cuda", "/tk", "3", "-DA=1"
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VIDEO_ATTN_BUILD_EXT", "yes"),
        ("VIDEO_ATTN_BUILD_EXT", "2"),
        ("VIDEO_ATTN_COMPONENTS", "cpu,hopper"),
        ("MAX_JOBS", "0"),
        ("MAX_JOBS", "-1"),
        ("MAX_JOBS", "many"),
    ],
)
def test_bad_values_name_the_variable(variable, value):
    with pytest.raises(BuildError, match=f"{variable}.*allowed:"):
        options(**{variable: value})


def test_nvcc_is_looked_for_in_order():
    def found(**environment):
        return build_plan.find_nvcc(options(**environment), lambda name: f"found {name}")

    assert found(CUDACXX="/a/nvcc", CUDA_HOME="/b") == "found /a/nvcc"
    assert found(CUDA_HOME="/b") == "found /b/bin/nvcc"
    assert found() == "found nvcc"
    assert build_plan.find_nvcc(options(), lambda name: None) == ""


def test_cuda_home_without_nvcc_is_not_replaced_by_path():
    def which(name):
        return "/usr/bin/nvcc" if name == "nvcc" else None

    assert build_plan.find_nvcc(options(CUDA_HOME="/empty"), which) == ""


def test_tools_of_this_machine():
    tools = build_plan.find_tools(options(CXX="mine"))
    assert tools.cxx == "mine"
    assert (tools.torch_dir / "include" / "ATen" / "ATen.h").is_file()
    assert tools.torch_version.startswith("2.")


# --- Plan: what is absent ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "component", "words"),
    [
        ({"system": "Darwin"}, "cpu", "Linux only, this is Darwin"),
        ({"torch_dir": None}, "cpu", "torch is not importable.*--no-build-isolation"),
        ({"cmake": ""}, "cpu", "cmake not found; pip install cmake"),
        ({"ninja": "", "make": ""}, "cpu", "neither ninja nor make found; pip install ninja"),
        ({"cxx": ""}, "cpu", "no C.. compiler found; install g.. 11"),
        ({"nvcc": ""}, "sta", "nvcc not found; install the CUDA toolkit.*Triton serves"),
        ({"nvcc": ""}, "sage", "nvcc not found"),
        ({"thunderkittens": ""}, "sta", "git submodule update --init third_party/ThunderKittens"),
        ({"thunderkittens": ""}, "vsa", "THUNDERKITTENS_ROOT.*Triton serves"),
        ({"python_include": ""}, "planning", "Python.h not found; install"),
    ],
)
def test_something_absent_leaves_the_component_out(sources, missing, component, words):
    tools = Tools(**{**TOOLS.__dict__, **missing})
    (planned,) = build_plan.make_plan((component,), options(), tools, sources)
    assert planned.reason is not None
    assert re.search(words, planned.reason)
    with pytest.raises(BuildError, match=f"component {component}, and VIDEO_ATTN_BUILD_EXT=1"):
        build_plan.make_plan((component,), options(VIDEO_ATTN_BUILD_EXT="1"), tools, sources)


@pytest.mark.parametrize("component", ["cpu", "planning"])
@pytest.mark.parametrize("missing", ["", "ninja", "make", "nvcc", "thunderkittens"])
def test_host_components_need_neither_cuda_nor_both_build_programs(sources, component, missing):
    tools = Tools(**{**TOOLS.__dict__, **({missing: ""} if missing else {})})
    assert build_plan.make_plan((component,), options(), tools, sources)[0].reason is None


def test_sage_needs_no_thunderkittens(sources):
    tools = Tools(**{**TOOLS.__dict__, "thunderkittens": ""})
    assert build_plan.make_plan(("sage",), options(), tools, sources)[0].reason is None


def test_thunderkittens_is_looked_for(tmp_path):
    """An empty submodule is absent; a folder that was named is taken, and checked by the build."""
    submodule = tmp_path / build_checks.SUBMODULE
    assert build_plan.find_thunderkittens(tmp_path, "") == ""
    submodule.mkdir(parents=True)
    assert build_plan.find_thunderkittens(tmp_path, "") == ""
    (submodule / "include").mkdir()
    (submodule / "include" / "kittens.cuh").touch()
    assert build_plan.find_thunderkittens(tmp_path, "") == str(submodule)
    assert build_plan.find_thunderkittens(tmp_path, "/named") == "/named"


def test_file_of_a_python_module_names_its_interpreter():
    names = {name: build_ext.file_name(spec) for name, spec in COMPONENTS.items()}
    assert names.pop("planning") == f"_planning{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert f"{sys.version_info[0]}{sys.version_info[1]}" in build_ext.file_name(
        COMPONENTS["planning"]
    )
    assert names == {name: f"_{name}.so" for name in names}


def test_no_sources_never_fails_a_build(tmp_path):
    plan = build_plan.make_plan(
        tuple(COMPONENTS), options(VIDEO_ATTN_BUILD_EXT="1"), Tools(), tmp_path
    )
    assert [item.reason for item in plan] == [build_plan.NO_SOURCES] * len(COMPONENTS)


def test_switch_0_builds_nothing(sources):
    plan = build_plan.make_plan(
        tuple(COMPONENTS), options(VIDEO_ATTN_BUILD_EXT="0"), TOOLS, sources
    )
    assert {item.reason for item in plan} == {"VIDEO_ATTN_BUILD_EXT=0"}


def test_components_of_the_environment_replace_those_of_the_setup_file(sources):
    plan = build_plan.make_plan(("cpu",), options(VIDEO_ATTN_COMPONENTS="vsa"), TOOLS, sources)
    assert [item.spec.name for item in plan] == ["vsa"]


@pytest.mark.parametrize(
    ("component", "asked", "archs"),
    [
        ("cpu", "", ()),
        ("sta", "", ("90a",)),
        ("sta", "80 90a", ("90a",)),
        ("sage", "", ("80", "89", "90a")),
        ("sage", "120", ("120",)),
    ],
)
def test_architectures(sources, component, asked, archs):
    (planned,) = build_plan.make_plan(
        (component,), options(VIDEO_ATTN_CUDA_ARCHS=asked), TOOLS, sources
    )
    assert (planned.reason, planned.cuda_archs) == (None, archs)


def test_the_wheel_holds_every_cuda_component(sources):
    """What `make wheel` asks for: each component for all that it has kernels for, or an error."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (archs,) = re.findall(r"^WHEEL_ARCHS \?= (\S+)$", makefile, re.MULTILINE)
    assert 'VIDEO_ATTN_BUILD_EXT=1 VIDEO_ATTN_CUDA_ARCHS="$(WHEEL_ARCHS)"' in makefile
    asked = options(VIDEO_ATTN_BUILD_EXT="1", VIDEO_ATTN_CUDA_ARCHS=archs)
    plan = build_plan.make_plan(tuple(COMPONENTS), asked, TOOLS, sources)
    assert {item.spec.name: item.cuda_archs for item in plan} == {
        "cpu": (), "planning": (), "sta": ("90a",), "vsa": ("90a",),
        "sage": ("80", "89", "90a", "120"),
    }  # fmt: skip
    without_nvcc = replace(TOOLS, nvcc="")
    with pytest.raises(BuildError, match="nvcc not found"):
        build_plan.make_plan(tuple(COMPONENTS), asked, without_nvcc, sources)


def test_hopper_kernels_are_left_out_for_other_architectures(sources):
    (planned,) = build_plan.make_plan(
        ("sta",), options(VIDEO_ATTN_CUDA_ARCHS="120"), TOOLS, sources
    )
    assert planned.reason == "its kernels are for 90a, VIDEO_ATTN_CUDA_ARCHS is not"


# --- Checks: what is unsuitable ----------------------------------------------------------------


def test_compiler_without_cxx20():
    old = build_checks.HostCompiler("g++-9", "g++-9 (Debian) 9.4.0", has_cxx20=False)
    with pytest.raises(BuildError) as caught:
        build_checks.check_host_compiler(old)
    message = str(caught.value)
    assert "found g++-9 (g++-9 (Debian) 9.4.0)" in message
    assert "needed g++ 11 or clang 14 or newer" in message
    assert "CXX=g++-11 pip install --no-build-isolation ." in message


def test_probe_of_an_old_compiler(tmp_path):
    old = script(tmp_path / "old", 'test "$1" = --version && echo "old 9.1" || exit 1\n')
    assert build_checks.probe_host_compiler(old) == build_checks.HostCompiler(old, "old 9.1", False)


def test_probe_of_a_compiler_that_does_not_run(tmp_path):
    for command in (str(tmp_path / "nowhere"), script(tmp_path / "broken", "exit 3\n")):
        with pytest.raises(BuildError, match="does not run.*set CXX"):
            build_checks.probe_host_compiler(command)


def test_probe_of_the_compiler_here():
    command = shutil.which("c++")
    if command is None:
        pytest.skip("no c++ on this machine")
    probe = build_checks.probe_host_compiler(command)
    assert probe.has_cxx20, f"{probe.version} cannot build the package"
    build_checks.check_host_compiler(probe)


@pytest.mark.parametrize(
    ("version", "arch", "needed"),
    [
        ((12, 2), "90a", "12.3"),
        ((11, 8), "80", "12.0"),  # C++20 in nvcc
        ((12, 7), "120", "12.8"),
        ((12, 6), "100", "12.8"),
        ((12, 8), "103", "12.9"),
    ],
)
def test_cuda_too_old(version, arch, needed):
    with pytest.raises(BuildError) as caught:
        build_checks.check_cuda("sage", "/cuda/bin/nvcc", version, ["80", arch])
    message = str(caught.value)
    assert f"found {version[0]}.{version[1]} (/cuda/bin/nvcc), needed {needed} or newer" in message
    assert f"export CUDA_HOME=/usr/local/cuda-{needed}" in message
    assert "VIDEO_ATTN_CUDA_ARCHS" in message


@pytest.mark.parametrize(
    ("version", "arch"), [((12, 3), "90a"), ((12, 0), "80"), ((12, 8), "120"), ((13, 0), "90a")]
)
def test_cuda_new_enough(version, arch):
    build_checks.check_cuda("sage", "nvcc", version, [arch])


def test_unknown_architecture():
    with pytest.raises(BuildError, match=r"architecture '9\.0' is unknown.*may name 80, 86"):
        build_checks.check_cuda("sta", "nvcc", (13, 0), ["9.0"])


@pytest.mark.parametrize("version", [(12, 4), (12, 9), (13, 0)], ids=str)
def test_cuda_that_needs_a_second_look(version):
    """The warning names the version, the range and the test that looks."""
    warning = build_checks.doubt_cuda(version, ["80", "90a"])
    assert warning is not None
    assert f"CUDA {version[0]}.{version[1]} " in warning and "12.4 to 13.0" in warning
    (test,) = re.findall(r"tests/[\w/]+\.py", warning)
    assert (ROOT / test).is_file()


@pytest.mark.parametrize(("version", "arch"), [((12, 3), "90a"), ((13, 1), "90a"), ((13, 0), "80")])
def test_cuda_without_doubt(version, arch):
    assert build_checks.doubt_cuda(version, [arch]) is None


def test_version_of_nvcc():
    text = "Cuda compilation tools, release 12.8, V12.8.93\nBuild cuda_12.8.r12.8/compiler"
    assert build_checks.parse_nvcc_version(text) == (12, 8)
    with pytest.raises(BuildError, match="no release number"):
        build_checks.parse_nvcc_version("hello")


def test_probe_of_nvcc(tmp_path):
    nvcc = script(tmp_path / "nvcc", 'echo "Cuda compilation tools, release 11.4, V11.4.1"\n')
    assert build_checks.probe_nvcc(nvcc) == (11, 4)
    with pytest.raises(BuildError, match="does not run.*CUDA_HOME"):
        build_checks.probe_nvcc(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.8.0", "1.13.1"])
def test_torch_too_old(version):
    with pytest.raises(BuildError) as caught:
        build_checks.check_torch(version)
    assert f"found {version}, needed 2.10 or newer" in str(caught.value)
    assert "pip install 'torch>=2.10'" in str(caught.value)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.0a0+git12", "3.0.0"])
def test_torch_new_enough(version):
    build_checks.check_torch(version)


@pytest.mark.parametrize("version", ["65.5.0", "76.1", "77.0.2"])
def test_old_setuptools(version):
    with pytest.raises(BuildError, match=f"setuptools {version} is too old, 77.0.3 or newer"):
        build_checks.check_setuptools(version)


def test_oldest_setuptools_is_that_of_the_requirements():
    needed = ".".join(map(str, build_checks.OLDEST_SETUPTOOLS))
    assert f'"setuptools>={needed}"' in (ROOT / "pyproject.toml").read_text()
    for version in (needed, "77.1", "80.9.0", "84.2.1.post0"):
        build_checks.check_setuptools(version)


def test_oldest_torch_is_that_of_the_requirements():
    needed = ".".join(map(str, build_checks.OLDEST_TORCH))
    assert f'"torch>={needed}"' in (ROOT / "pyproject.toml").read_text()


def test_missing_submodule(tmp_path):
    folder = build_checks.thunderkittens_dir(tmp_path, "")
    with pytest.raises(BuildError) as caught:
        build_checks.check_thunderkittens("sta", folder)
    message = str(caught.value)
    assert str(tmp_path / "third_party/ThunderKittens") in message
    assert "git submodule update --init third_party/ThunderKittens" in message
    assert "THUNDERKITTENS_ROOT" in message


def test_thunderkittens_from_elsewhere(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "kittens.cuh").touch()
    folder = build_checks.thunderkittens_dir(Path("/unused"), str(tmp_path))
    build_checks.check_thunderkittens("sta", folder)
    assert folder == tmp_path


# --- Records and the table ---------------------------------------------------------------------


def test_records_are_kept_and_read_back(tmp_path):
    built = build_record.make_record(
        "cpu", "1.0", "abc", architectures=["DEFAULT"], compiler="g++ 12", torch="2.13.0"
    )
    left_out = build_record.make_record("sta", "1.0", None, reason="nvcc not found")
    for record in (left_out, built):
        build_record.write_record(tmp_path, record)
    assert build_record.read_records(tmp_path) == [built, left_out]
    assert (built["built"], left_out["built"]) == (True, False)
    first = (tmp_path / "_cpu.json").read_bytes()
    build_record.write_record(tmp_path, built)
    assert (tmp_path / "_cpu.json").read_bytes() == first


def test_table():
    records = [
        build_record.make_record("cpu", "1", None, architectures=["DEFAULT", "AVX2"]),
        build_record.make_record("sta", "1", None, reason="nvcc not found; set CUDA_HOME"),
        build_record.make_record("vsa", "1", None, reason="nvcc not found; set CUDA_HOME"),
    ]
    assert build_record.format_table(records).splitlines() == [
        "native components of video-attn",
        "  component  built  architectures  why not",
        "  cpu        yes    DEFAULT AVX2",
        "  sta        no     -              nvcc not found",
        "  vsa        no     -              nvcc not found",
        "nvcc not found: set CUDA_HOME",
    ]


def test_git_revision(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    assert build_record.git_revision(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    clean = build_record.git_revision(tmp_path)
    assert clean is not None and len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert build_record.git_revision(tmp_path) == f"{clean}-dirty"
    (tmp_path / "unpacked").mkdir()
    assert build_record.git_revision(tmp_path / "unpacked") is None  # another project's commit


# --- Commands ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils")
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, []), ({"user": 1}, ["--user"]), ({"prefix": "/opt/x"}, ["--prefix", "/opt/x"])],
)
def test_install_runs_pip(given, expected):
    given = {name: ("command line", value) for name, value in given.items()}
    command = build_install.pip_command(given)
    assert command[:5] == [sys.executable, "-m", "pip", "install", "--no-build-isolation"]
    assert command[5:] == [*expected, str(ROOT)]


def test_install_refuses_options_that_pip_lacks():
    with pytest.raises(BuildError, match=r"does not know --home, --install-lib"):
        build_install.pip_command(
            {"install_lib": ("command line", "/x"), "home": ("command line", "/y")}
        )


def test_install_without_pip(monkeypatch):
    monkeypatch.setattr(build_install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="python -m ensurepip"):
        build_install.pip_command({})


def test_library_is_replaced_not_overwritten(tmp_path):
    """A process that runs with the old library keeps its pages."""
    built, folder = tmp_path / "tree" / "_cpu.so", tmp_path / "package"
    built.parent.mkdir()
    folder.mkdir()
    (folder / "_cpu.so").write_text("old")
    with open(folder / "_cpu.so") as in_use:
        built.write_text("new")
        build_ext.place_library(built, folder)
        assert in_use.read() == "old"
    assert [path.name for path in folder.iterdir()] == ["_cpu.so"]
    assert (folder / "_cpu.so").read_text() == "new"


def test_one_build_at_a_time_in_a_tree(tmp_path):
    take = fcntl.LOCK_EX | fcntl.LOCK_NB
    lock = tmp_path / ".lock"
    lock.touch()
    with open(lock) as other, build_ext.locked(tmp_path), pytest.raises(BlockingIOError):
        fcntl.flock(other, take)
    with open(lock) as other:
        fcntl.flock(other, take)


def cmakes() -> list[str]:
    """The CMake of the environment, and that of the system, which may be old."""
    found = (
        find_tools(BuildOptions()).cmake,
        shutil.which("cmake", path="/usr/bin:/usr/local/bin"),
    )
    return list(dict.fromkeys(filter(None, found)))


@pytest.mark.skipif(not find_tools(BuildOptions()).nvcc, reason="nvcc not found")
@pytest.mark.skipif(not cmakes(), reason="cmake not found")
@pytest.mark.parametrize("cmake", cmakes())
def test_every_cuda_compile_is_told_its_language_once(cmake, tmp_path):
    """CMake 3.25.1, of Debian 12, knows no CUDA C++20: it would refuse, or take C++17."""
    tools = find_tools(BuildOptions())
    command = [
        cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Unix Makefiles",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DVIDEO_ATTN_COMPONENT=sage",
        "-DVIDEO_ATTN_CUDA_ARCHS=90a", f"-DVIDEO_ATTN_TORCH_DIR={tools.torch_dir}",
    ]  # fmt: skip
    environment = {**os.environ, "CUDACXX": tools.nvcc}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "compile_commands.json").read_text())
    assert {Path(line["file"]).suffix for line in lines} == {".cu", ".cpp"}
    for line in lines:
        assert re.findall(r"-std[= ]\S+", line["command"]) == ["-std=c++20"], line["command"]
