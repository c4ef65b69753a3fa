"""Before any test: the Triton interpreter where there is no GPU, threads, poisoned allocations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from gpu_process import CHILD, GpuProcesses
from hypothesis import settings
from machine import HAS_GPU
from poison import poison_allocations

if not HAS_GPU:
    # Read when a kernel is defined, so it must be set before video_attn imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Forced backends of the outside would change what the tests run; a wish is said by another name.
os.environ.pop("VIDEO_ATTN_BACKEND", None)
if "VIDEO_ATTN_TEST_BACKEND" in os.environ:  # "triton": the gpu tests again, on Triton alone
    os.environ["VIDEO_ATTN_BACKEND"] = os.environ["VIDEO_ATTN_TEST_BACKEND"]
if "OMP_NUM_THREADS" not in os.environ:  # parallel test processes share the cores
    _processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _processes))

# The same examples in every run: a failure is found again, and a green run means the same twice.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    if HAS_GPU and CHILD not in os.environ:
        config.pluginmanager.register(GpuProcesses(config))
    # Poison and masked lanes: numpy warns about a NaN that a GPU computes without a word.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
            )


@pytest.fixture
def gpu() -> torch.device:
    """The GPU of tests marked ``gpu``."""
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def on_quick_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests of what stands above the kernels; one marked ``gpu`` runs on its GPU's backends."""
    from video_cases import quick_backend

    with nullcontext() if request.node.get_closest_marker("gpu") else quick_backend():
        yield


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package gets from torch.empty and the like is NaN (integers: garbage), so that
    anything left unwritten is seen.
    """
    poison_allocations(monkeypatch.setattr)


@pytest.fixture
def deterministic_algorithms() -> Iterator[None]:
    """torch.use_deterministic_algorithms(True) during a test."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
