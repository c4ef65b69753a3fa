"""Left operands of tensor core products in registers: none is given to another product.

ptxas of CUDA 12.4 to 13.0 did so with the gradient of the queries at head dim 64; source, PTX and
the emulation were right. Every kernel is assembled here by every ptxas at hand, and the machine
code is read: no GPU needed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import build_checks
import kernel_table
import pytest
from build_plan import ROOT, BuildOptions, find_tools
from machine_code import Function, Instruction, find_disassembler, read_functions
from sage_machine_code import NVCC_FLAGS
from wgmma_operands import clashes, written_registers

TOOLS = find_tools(BuildOptions.from_environment(os.environ))
MISSING = kernel_table.missing_tool(TOOLS)
needs_nvcc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

UNITS = (
    *(f"hopper/{x}.cu" for x in ("sta_forward", "sta_backward", "vsa_forward", "vsa_backward")),
    *(f"sage/hopper_{head_dim}.cu" for head_dim in (64, 128)),
)


@functools.cache
def assemblers() -> dict[str, str]:
    """Every ptxas at hand that knows sm_90a, by its version."""
    folders = [str(Path(TOOLS.nvcc).resolve().parent), *os.get_exec_path()]
    folders += map(str, Path("/usr/local").glob("cuda*/bin"))
    for package in ("triton", "nvidia"):
        spec = find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            folders += map(str, {path.parent for path in Path(place).glob("**/bin/ptxas")})
    found: dict[str, str] = {}
    for folder in folders:
        for name in ("ptxas", "ptxas-blackwell"):
            path = shutil.which(name, path=folder)
            if path is None:
                continue
            done = subprocess.run([path, "--version"], capture_output=True, text=True)
            version = re.search(r"release (\d+)\.(\d+)", done.stdout)
            if version and (int(version[1]), int(version[2])) >= build_checks.CUDA_FOR_ARCH["90a"]:
                found.setdefault(f"{version[1]}.{version[2]}", path)
    return found


def compile_ptx(unit: str, folder: Path) -> Path:
    """The PTX of a file of kernels, which says that it is old enough for every assembler here."""
    ptx = folder / "kernels.ptx"
    command = [TOOLS.nvcc, *NVCC_FLAGS, "-arch=compute_90a", "-DKITTENS_HOPPER"]
    command += ["-isystem", f"{TOOLS.thunderkittens}/include", "-ptx", "-o", str(ptx)]
    subprocess.run([*command, str(ROOT / "csrc" / unit)], check=True)
    text, replaced = re.subn(r"(?m)^\.version .*$", ".version 8.3", ptx.read_text())
    assert replaced == 1
    ptx.write_text(text)
    return ptx


def assemble(ptx: Path, assembler: str) -> list[Function]:
    cubin, disassembler = ptx.with_suffix(".cubin"), find_disassembler(TOOLS.nvcc)
    assert disassembler is not None
    subprocess.run([assembler, "-arch=sm_90a", str(ptx), "-o", str(cubin)], check=True)
    return read_functions(cubin, disassembler)


@needs_nvcc
@pytest.mark.parametrize("unit", UNITS)
def test_no_product_multiplies_what_was_written_for_another(unit, tmp_path):
    ptx = compile_ptx(unit, tmp_path)
    wrong = []
    for version, assembler in assemblers().items():
        kernels = [x for x in assemble(ptx, assembler) if x.count("HGMMA", "IGMMA", "QGMMA")]
        assert kernels
        wrong += [
            f"CUDA {version}, {kernel.symbol}: {clash}"
            for kernel in kernels
            for clash in clashes(kernel)
        ]
    assert not wrong, "\n".join(wrong)


# -- how machine code is read ----------------------------------------------------------------------


def kernel(*lines: str) -> Function:
    """A kernel of these instructions, one every 16 bytes."""
    code = (
        Instruction(16 * place, re.sub(r"^@\S+ ", "", text).split()[0].split(".")[0], text)
        for place, text in enumerate(lines)
    )
    return Function("kernel", 168, 0, 0, tuple(code))


SCORES = "HGMMA.64x64x16.F32.BF16 R56, R136, gdesc[UR16], RZ, !UPT, gsb0"
RESULT = "HGMMA.64x64x16.F32.BF16 R88, R136, gdesc[UR16].tnspB, R88, gsb0"
LOAD = "LDSM.16.M88.4 R136, [R4]"


def pack(operand: int) -> list[str]:
    return [f"F2FP.BF16.F32.PACK_AB R{operand + i}, R9, R8" for i in range(4)]


def test_the_fault_is_seen():
    """Loaded once, multiplied in a loop that writes another operand to the same registers."""
    (clash,) = clashes(kernel(LOAD, SCORES, *pack(136), RESULT, "@!P0 BRA 0x10", "EXIT"))
    assert (clash.first.text, clash.second.text) == (RESULT, SCORES)
    assert str(clash).startswith(f"{SCORES} at 0x10 may read what was written for {RESULT}")


def test_one_written_register_of_the_four_hides_nothing():
    keep = "LOP3.LUT R136, R136, R3, RZ, 0x3c, !PT"
    assert clashes(kernel(LOAD, SCORES, *pack(136), RESULT, keep, "@!P0 BRA 0x10", "EXIT"))


def test_a_write_that_may_be_skipped_hides_nothing():
    again = f"@P1 {LOAD}"
    assert clashes(kernel(LOAD, SCORES, *pack(136), RESULT, again, "@!P0 BRA 0x10", "EXIT"))


@pytest.mark.parametrize(
    "lines",
    [
        (LOAD, SCORES, *pack(136), RESULT, LOAD, "@!P0 BRA 0x10", "EXIT"),  # written again
        (LOAD, SCORES, *pack(136), RESULT, "EXIT"),  # no way back
        (LOAD, SCORES, SCORES.replace("R56", "R24"), "@!P0 BRA 0x10", "EXIT"),  # the same operand
        (LOAD, SCORES, *pack(140), RESULT.replace("R136", "R140"), "@!P0 BRA 0x10", "EXIT"),
        (*pack(136), RESULT, *pack(136), "@!P0 BRA 0x40", "EXIT"),  # for the next turn
    ],
    ids=["written_again", "no_loop", "one_operand", "other_registers", "next_turn"],
)
def test_shared_registers_that_are_right(lines):
    assert clashes(kernel(*lines)) == []


@pytest.mark.parametrize(
    ("text", "registers"),
    [
        ("LDSM.16.M88.4 R136, [R4]", range(136, 140)),
        ("@P0 LDS.128 R20, [R4+0x10]", range(20, 24)),
        ("IMAD.WIDE.U32 R6, R2, 0x4, R4", range(6, 8)),
        ("CS2R R8, SRZ", range(8, 10)),
        ("SHFL.BFLY PT, R7, R6, 0x1, 0x1f", range(7, 8)),
        ("HGMMA.64x128x16.F32.BF16 R24, R136, gdesc[UR4], R24", range(24, 88)),
        ("STS.128 [R4], R20", range(0)),
        ("ISETP.GE.AND P0, PT, R4, R5, PT", range(0)),
        ("BAR.SYNC R4, 0x80", range(0)),
        ("WARPGROUP.ARRIVE", range(0)),
        ("MOV R4, R5", range(4, 5)),
    ],
)
def test_what_an_instruction_writes(text, registers):
    assert written_registers(kernel(text).code[0]) == registers


def test_the_build_warns_of_every_assembler_that_is_wrong():
    """The range of versions is said once."""
    first, last = build_checks.CUDA_SHARING_OPERANDS
    assert build_checks.doubt_cuda(first, ["90a"]) and build_checks.doubt_cuda(last, ["90a"])
