"""What a build leaves behind, how it installs, and that two builds stay apart."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build_ext
import build_install
import build_record
import pytest
from build_checks import BuildError
from build_plan import BuildOptions, find_tools
from build_tree import ROOT

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
