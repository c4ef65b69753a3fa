"""What the setup files build and refuse, and what wheels and sdists hold.

Nothing is compiled here. Every way of installing, one after the other: test_install.py (slow).
"""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import build_plan
import build_record
import pytest
from build_plan import COMPONENTS
from build_tree import copy_tree, put_source, run_setup, script


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("build"))


@pytest.mark.parametrize(
    ("setup_file", "names"),
    [
        ("setup.py", {"cpu", "sta", "vsa", "sage", "planning"}),
        ("setup_sta.py", {"cpu", "sta"}),
        ("setup_vsa.py", {"cpu", "vsa"}),
    ],
)
def test_components_of_each_setup_file(tree, setup_file, names):
    stale = tree / "build" / "lib" / "video_attn" / "_sage.so"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.touch()
    done = run_setup(tree, "build", script=setup_file, VIDEO_ATTN_BUILD_EXT="0")
    assert done.returncode == 0, done.stdout
    records = build_record.read_records(tree / "build" / "lib" / "video_attn")
    assert {record["component"] for record in records} == names
    assert not stale.exists(), "a library of an earlier build would travel with this one"
    table = done.stdout.rstrip().splitlines()[-len(names) - 2 :]
    assert table[0] == "native components of video-attn"


@pytest.fixture(scope="module")
def wheel(tree):
    done = run_setup(tree, "-q", "bdist_wheel", "-d", "out", VIDEO_ATTN_BUILD_EXT="0")
    assert done.returncode == 0, done.stdout
    (path,) = (tree / "out").glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(tree, wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        records = {name for name in names if Path(name).match("_*.json")}
        reason = json.loads(archive.read("video_attn/_cpu.json"))["reason"]
    python = tree / "python"
    expected = {
        str(path.relative_to(python))
        for path in python.rglob("*")
        if path.is_file() and not {"__pycache__", "video_attn.egg-info"} & set(path.parts)
    }
    assert names - records == expected
    assert records == {f"video_attn/_{name}.json" for name in COMPONENTS}
    assert reason in ("VIDEO_ATTN_BUILD_EXT=0", build_plan.NO_SOURCES)


def test_metadata_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(info["METADATA"]).decode()
        scripts = archive.read(info["entry_points.txt"]).decode()
    assert "Name: video-attn\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert "LICENSE" in info
    assert "video-attn = video_attn.cli:main" in scripts


def test_sdist_holds_what_a_build_needs(tree, tmp_path, wheel):
    done = run_setup(tree, "-q", "sdist", "-d", "out", VIDEO_ATTN_BUILD_EXT="0")
    assert done.returncode == 0, done.stdout
    (path,) = (tree / "out").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    for folder in ("cmake", "csrc", "python", "tests", "tools"):
        for source in (tree / folder).rglob("*"):
            if source.is_file() and not source.match("*.pyc"):
                assert (unpacked / source.relative_to(tree)).is_file(), source
    assert not list(unpacked.rglob("*.so")) and not list(unpacked.rglob("video_attn/_*.json"))
    done = run_setup(
        unpacked, "-q", "bdist_wheel", "-d", "out", script="setup_vsa.py", VIDEO_ATTN_BUILD_EXT="0"
    )
    assert done.returncode == 0, done.stdout
    assert [built.name for built in (unpacked / "out").iterdir()] == [wheel.name]


NAMED = {
    "THUNDERKITTENS_ROOT": "/nowhere"
}  # what is named must be there; an empty submodule is absent


@pytest.fixture
def cuda_tree(tmp_path):
    """A tree with one CUDA component, for builds that are refused before a compiler runs."""
    tree = copy_tree(tmp_path)
    put_source(tree, "bindings/sta.cpp")
    return tree


def test_build_without_thunderkittens_goes_on(cuda_tree, tmp_path):
    """A checkout without submodules builds the rest, and says what is missing."""
    nvcc = script(tmp_path / "nvcc", 'echo "Cuda compilation tools, release 13.0, V"\n')
    shutil.rmtree(cuda_tree / "third_party", ignore_errors=True)
    done = run_setup(
        cuda_tree, "build_ext", CUDACXX=nvcc, VIDEO_ATTN_COMPONENTS="sta", THUNDERKITTENS_ROOT=""
    )
    assert done.returncode == 0, done.stdout
    last = done.stdout.rstrip().splitlines()[-2:]
    assert last[0].endswith("ThunderKittens is not in third_party/ThunderKittens")
    assert "git submodule update --init third_party/ThunderKittens" in last[1]


def test_build_without_nvcc_says_so_once(cuda_tree):
    put_source(cuda_tree, "bindings/vsa.cpp")
    done = run_setup(
        cuda_tree, "build_ext", CUDACXX="/nowhere/nvcc", VIDEO_ATTN_COMPONENTS="sta,vsa"
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("install the CUDA toolkit and set CUDA_HOME") == 1
    assert not list(cuda_tree.glob("build/**/*.so"))


@pytest.mark.parametrize(
    ("release", "environment", "words"),
    [
        ("12.2", NAMED, "CUDA is too old for sm_90a: found 12.2"),
        (
            "13.0",
            {"VIDEO_ATTN_BUILD_EXT": "1", "THUNDERKITTENS_ROOT": ""},
            "git submodule update --init third_party/ThunderKittens",
        ),
        ("13.0", NAMED, "ThunderKittens is not in /nowhere"),
        ("13.0", {"CXX": "old-compiler"}, "cannot compile C++20: found"),
        ("13.0", {"VIDEO_ATTN_BUILD_EXT": "maybe"}, "VIDEO_ATTN_BUILD_EXT is 'maybe'"),
    ],
)
def test_refused_builds_end_with_the_remedy(cuda_tree, tmp_path, release, environment, words):
    nvcc = script(tmp_path / "nvcc", f'echo "Cuda compilation tools, release {release}, V"\n')
    old = script(tmp_path / "old", 'test "$1" = --version && echo "old 9.1" || exit 1\n')
    if "CXX" in environment:
        environment = {**NAMED, "CXX": old}
    done = run_setup(
        cuda_tree, "build_ext", CUDACXX=nvcc, VIDEO_ATTN_COMPONENTS="sta", **environment
    )
    assert done.returncode != 0
    assert words in done.stdout, done.stdout
    assert "Traceback" not in done.stdout
