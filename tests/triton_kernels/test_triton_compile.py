"""The Triton kernels compile for every chip of the launch tables, and fit it. No GPU is needed.

The compiles run in a process of their own, because kernels that Triton interprets cannot be
compiled. What is read of each: shared memory against the chip's, spills, the matrix instruction.
Every change compiles a part (minutes, so these tests run first), `make test-all` every row.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from video_attn.kernels import launch_tables

pytestmark = pytest.mark.first
ROOT = Path(__file__).resolve().parents[2]
CHIPS = sorted(launch_tables.SHARED_MEMORY)
ATTENTION = (*launch_tables.KERNELS, *launch_tables.CODE_KERNELS)  # the other kernels are small
# What the products of codes multiply: those of Q and K, those of P and V.
MULTIPLIED = {"sage_fp16": ["fp16", "int8"], "sage_fp8": ["fp8", "int8"], "fp8": ["fp8"]}


def compile_matrix(folder: Path, *options: str) -> list[dict]:
    """The results of benchmarks/compile_matrix.py."""
    out = folder / "results.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    jobs = max(1, len(os.sched_getaffinity(0)) // processes)  # other tests run meanwhile
    command = [sys.executable, str(ROOT / "benchmarks" / "compile_matrix.py")]
    command += ["--json", str(out), "--jobs", str(jobs)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def covered(tmp_path_factory) -> list[dict]:
    """Compiled once for all workers of pytest-xdist: it takes minutes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    kept = folder / "covered.json"
    with open(folder / "covered.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            results = compile_matrix(tmp_path_factory.mktemp("cover"), "--cover")
            kept.write_text(json.dumps(results))
    return json.loads(kept.read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> list[dict]:
    return compile_matrix(tmp_path_factory.mktemp("all"))


def check(results: list[dict], arch: str) -> None:
    """Every result of a chip, with all that is wrong in one message."""
    of_chip = [result for result in results if result["case"][0] == arch]
    assert of_chip, f"nothing was compiled for {arch}"
    wrong = [f"{x['case'][1:]} ({x['row']}): {y}" for x in of_chip for y in mistakes(x)]
    assert not wrong, "\n".join(wrong)


def mistakes(result: dict) -> list[str]:
    """What is wrong with a compile, in words."""
    arch, kernel, itemsize, head_dim, _, variant = result["case"]
    if result["error"]:
        return [result["error"]]
    found = []
    if result["shared"] > launch_tables.SHARED_MEMORY[arch]:
        found.append(f"{result['shared']} bytes of shared memory")
    codes = kernel in launch_tables.CODE_KERNELS
    forward = codes or (kernel == "forward" and itemsize == 2)
    forward = forward and head_dim <= 128
    # The masked steps of FP8 codes may spill a few registers (as bytes): 16. Where rows are
    # gathered, all codes may, on chips whose products keep both operands in registers.
    allowed_spills = 64 if codes and kernel != "sage_fp16" else 0
    if codes and variant == "gather":
        allowed_spills = 256
    if kernel == "select_top_k":  # four registers, of rows longer than a model's, on sm_86
        allowed_spills = 16
    if arch == "sm_90":
        # Chosen by time on a card, where Triton 3.6 spills 8 bytes of them at most; 3.9, whose
        # kernels have not been timed, spills up to 136. The tuner's limit, FEW_SPILLS, is 128.
        allowed_spills = max(allowed_spills, 136)
    if result["spills"] > allowed_spills and (forward or kernel not in ATTENTION):
        found.append(f"{result['spills']} spills")
    if codes and result["instruction"].split()[1:] != MULTIPLIED[kernel]:
        found.append(f"instruction {result['instruction']!r} multiplies something else")
    allowed = instructions(arch, kernel, itemsize)
    if variant == "offset" and arch.startswith("sm_"):
        allowed = ("mma.sync",)  # not those with descriptors: see launch_tables_nvidia.DESCRIPTORS
    if not result["instruction"].startswith(allowed):
        found.append(f"instruction {result['instruction']!r} is none of {allowed}")
    return found


def instructions(arch: str, kernel: str, itemsize: int) -> tuple[str, ...]:
    """Beginnings of the matrix instruction that must be there; "" allows none at all."""
    if kernel not in ATTENTION:
        return ("",)
    if itemsize == 4:  # in full precision only CDNA has one
        return ("v_mfma_f32",) if arch.startswith("gfx9") else ("",)
    if arch.startswith("gfx"):
        unit = "v_mfma" if arch.startswith("gfx9") else "v_wmma"
        return (f"{unit}_f32", f"{unit}_i32") if itemsize == 1 else (f"{unit}_f32",)
    special = {"sm_90": ("wgmma", "mma.sync"), "sm_100": ("tcgen05", "mma.sync")}
    return special.get(arch, ("mma.sync",))


@pytest.mark.parametrize("arch", CHIPS)
def test_rows_compile_and_fit(arch: str, covered: list[dict]):
    check(covered, arch)


@pytest.mark.parametrize(("arch", "instruction"), [("sm_90", "wgmma"), ("sm_100", "tcgen05")])
def test_the_newest_instructions_are_used(arch: str, instruction: str, covered: list[dict]):
    """On Hopper and Blackwell the rows of up to 128 dims own tiles large enough for them."""
    found = {}
    for result in covered:
        chip, kernel, itemsize, head_dim, _, variant = result["case"]
        if variant == "offset":
            continue
        if chip == arch and kernel in ATTENTION and itemsize <= 2 and head_dim <= 128:
            found[tuple(result["case"])] = result["instruction"]
    kernels = {kernel for _, kernel, *_ in found}
    assert kernels == set(ATTENTION)
    assert all(x.startswith(instruction) for x in found.values()), found


def test_the_cover_has_every_chip_kernel_and_kind_of_row(monkeypatch: pytest.MonkeyPatch):
    """What is compiled for every change is no accident of the loops that list it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from compile_cases import CODE_VARIANTS, POOL_KERNELS, QUANTIZERS, VARIANTS, code_kernels, cover

    cases = list(cover())
    assert len(set(cases)) == len(cases)
    for arch in CHIPS:
        expected = {"prepare", *POOL_KERNELS, *QUANTIZERS, *launch_tables.KERNELS}
        expected |= set(code_kernels(arch))
        assert {case.kernel for case in cases if case.arch == arch} == expected, arch
    assert {case.variant for case in cases} == {*VARIANTS, *CODE_VARIANTS}
    plain = [case for case in cases if case.variant == "lens"]
    for kernel in ATTENTION:
        kinds = {(x.head_dim, x.grain) for x in plain if x.kernel == kernel and x.arch != "sm_90"}
        assert kinds >= set(itertools.product((64, 128), launch_tables.GRAINS)), kernel
    compiled = {_row(case) for case in plain if case.arch == "sm_90" and case.kernel in ATTENTION}
    for (kernel, itemsize, head_dim), rows in launch_tables.TABLES["sm_90"].items():
        if itemsize <= 2 and head_dim <= 128:
            assert compiled >= {(kernel, itemsize, head_dim, row) for row in rows}


def _row(case: Any) -> tuple:
    """What a case of an attention kernel compiles of its table."""
    arch, kernel, itemsize, head_dim, grain, _ = case
    row = launch_tables.launch_row(arch, kernel, head_dim, itemsize, grain)
    return kernel, itemsize, head_dim, row


@pytest.mark.slow
@pytest.mark.parametrize("arch", CHIPS)
def test_every_row_compiles_and_fits(arch: str, everything: list[dict]):
    check(everything, arch)
