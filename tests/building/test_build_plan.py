"""What the build reads from its environment, and what it decides to make."""

from __future__ import annotations

import re
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import build_checks
import build_ext
import build_plan
import pytest
from build_checks import BuildError
from build_plan import COMPONENTS, BuildOptions, Tools
from build_tree import ROOT, put_source

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
