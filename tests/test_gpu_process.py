"""The plugin that replaces poisoned processes, proven without a GPU.

A small project marks its tests ``gpu`` and calls its process poisoned after a certain test, as
CUDA does: from then on every test of that process fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import sys
import pytest

sys.path.insert(0, {folder!r})
import gpu_process

state = sys.modules.setdefault("state", type(sys)("state"))
state.poison = None


@pytest.fixture
def of_the_conftest():
    return 1


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs in the child")
    if gpu_process.CHILD not in gpu_process.os.environ:
        config.pluginmanager.register(gpu_process.GpuProcesses(config, seconds={seconds}))


if gpu_process.CHILD in gpu_process.os.environ:

    def pytest_process_poison():
        return state.poison
"""

TESTS = """
import os, signal, sys, time
import pytest, state

NUMBERS = pytest.mark.parametrize("n", range(6), ids="problem{}".format)


@pytest.fixture(scope="module")
def process():
    return os.getpid()


def healthy():
    assert state.poison is None, "poisoned by an earlier test"


@pytest.mark.gpu
@NUMBERS
def test_errors(n, process):
    healthy()
    assert process == os.getpid() and process != os.getppid()
    if n in (1, 3):
        state.poison = "illegal memory access"
        raise RuntimeError("CUDA error")
    assert n != 4, "wrong, but harmless"


@pytest.mark.gpu
@NUMBERS
def test_late(n):
    healthy()
    if n == 2:
        state.poison = "the kernel fails after the test"


@pytest.mark.gpu
@NUMBERS
def test_deaths(n):
    healthy()
    if n == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    if n == 4:
        os._exit(3)


def test_here(request):
    assert request.config.pluginmanager.has_plugin("terminalreporter")
    assert "VIDEO_ATTN_TEST_CHILD" not in os.environ


@pytest.mark.gpu
def test_hang():
    time.sleep(60)


@pytest.mark.gpu
def test_skip():
    pytest.skip("not here")


def test_here_again():
    assert "VIDEO_ATTN_TEST_CHILD" not in os.environ
"""

OTHER = """
import os
import pytest

if "VIDEO_ATTN_TEST_CHILD" in os.environ and __name__ == "test_unlike":
    raise ImportError("only in the child")


@pytest.mark.gpu
def test_last(of_the_conftest):
    assert "VIDEO_ATTN_TEST_CHILD" in os.environ
"""


def test_one_poisoned_test_fails_alone(pytester: pytest.Pytester):
    pytester.makeconftest(CONFTEST.format(folder=str(Path(__file__).parent), seconds=3))
    pytester.makepyfile(test_it=TESTS, test_other=OTHER, test_unlike=OTHER)
    result = pytester.runpytest_subprocess("-p", "no:xdist", "-rfs")
    result.assert_outcomes(passed=15, failed=8, skipped=1)
    text = result.stdout.str()
    for failed in (
        "test_errors[problem1]", "test_errors[problem3]", "test_errors[problem4]",
        "test_late[problem2]", "test_deaths[problem0]", "test_deaths[problem4]", "test_hang",
    ):  # fmt: skip
        assert f"FAILED test_it.py::{failed}" in text, failed
    assert "poisoned by an earlier test" not in text
    for line in (
        "test_it.py::test_errors: 3 of 6, first problem1",
        "test_it.py::test_late: 1 of 6, first problem2",
        "test_it.py::test_deaths: 2 of 6, first problem0",
        "*the kernel fails after the test*",
        "*the process of this test died: signal 11*",
        "*the process of this test died: exit code 3*",
        "*the test did not end within 3 seconds*",
        "*the child cannot collect test_unlike.py*",
    ):
        result.stdout.fnmatch_lines([line])


def test_without_the_plugin_the_rest_fails(pytester: pytest.Pytester):
    """The small project is as bad as CUDA: the tests above prove something."""
    conftest = CONFTEST.format(folder=str(Path(__file__).parent), seconds=3)
    pytester.makeconftest(conftest.replace("config.pluginmanager.register", "bool"))
    pytester.makepyfile(test_it=TESTS)
    result = pytester.runpytest_subprocess("-p", "no:xdist", "-k", "errors or late")
    result.assert_outcomes(passed=1, failed=11, deselected=10)
    assert "poisoned by an earlier test" in result.stdout.str()
