"""Every environment variable that means something here; one that is missing does not exist."""

from __future__ import annotations

from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable; ``when`` is "run", "build" or "test"."""

    name: str
    when: str
    values: str
    default: str
    effect: str


VARIABLES = (
    Variable(
        "VIDEO_ATTN_BACKEND", "run", "a backend's name", "the best that can serve",
        "forces that backend; a call that it cannot serve raises and says why",
    ),
    Variable(
        "TRITON_INTERPRET", "run", "0, 1", "0",
        "1 runs Triton kernels in Triton's interpreter, on the CPU: for tests, very slow",
    ),
    Variable(
        "TRITON_CACHE_DIR", "run", "a folder", "~/.triton/cache",
        "where Triton keeps what it compiled, and `video-attn warmup` puts it",
    ),
    Variable(
        "OMP_NUM_THREADS", "run", "a number", "all cores",
        "threads of torch and of the CPU backend",
    ),
    Variable(
        "VIDEO_ATTN_BUILD_EXT", "build", "auto, 0, 1", "auto",
        "0 builds no native component, 1 fails where one cannot be built, auto leaves it out",
    ),
    Variable(
        "VIDEO_ATTN_COMPONENTS", "build", "names, comma-separated", "those of the setup file",
        "which native components to build: cpu, sta, vsa, sage, planning",
    ),
    Variable(
        "VIDEO_ATTN_CUDA_ARCHS", "build", "as 80,90a", "each component's own list",
        "CUDA architectures to compile for",
    ),
    Variable("CXX", "build", "a program", "CMake's choice", "the C++ compiler, gcc 11 or newer"),
    Variable("CUDACXX", "build", "a path", "nvcc of CUDA_HOME", "the CUDA compiler"),
    Variable("CUDA_HOME", "build", "a path", "where nvcc on PATH is", "the CUDA toolkit"),
    Variable(
        "THUNDERKITTENS_ROOT", "build", "a path", "third_party/ThunderKittens",
        "another checkout of ThunderKittens",
    ),
    Variable("MAX_JOBS", "build", "a number", "ninja's choice", "compilers run at the same time"),
    Variable("CMAKE_ARGS", "build", "CMake options", "none", "passed on to CMake"),
)  # fmt: skip
