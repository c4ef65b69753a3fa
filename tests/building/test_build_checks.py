"""Tools that are there and do not serve: what the build says of each."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import build_checks
import pytest
from build_checks import BuildError
from build_tree import ROOT, script


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
