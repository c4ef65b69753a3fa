"""The machine code of the Hopper kernels, read without a GPU, and the libraries that hold it.

What needs nvcc and ThunderKittens is skipped where they are not. The first build takes a minute or
two; later ones take what build/native has.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_table
import pytest
from build_plan import BuildOptions, find_tools
from build_tree import copy_tree, run_setup
from machine_code import Function, Instruction, find_disassembler, parse_functions

TOOLS = find_tools(BuildOptions.from_environment(os.environ))
MISSING = kernel_table.missing_tool(TOOLS)
needs_nvcc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
COMPONENTS = pytest.mark.parametrize("component", kernel_table.COMPONENTS)
GROWTH = 1.1
ELEMENTS, HEAD_DIMS = ("__half", "__nv_bfloat16"), (64, 128)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return kernel_table.build_libraries(tmp_path_factory.mktemp("hopper"))


@pytest.fixture(scope="module")
def kernels(libraries: dict[str, Path]) -> dict[str, dict[str, Function]]:
    disassembler = find_disassembler(TOOLS.nvcc)
    assert disassembler is not None
    return {name: kernel_table.read_kernels(path, disassembler) for name, path in libraries.items()}


@pytest.fixture(scope="module")
def table(libraries: dict[str, Path]) -> dict[str, Any]:
    return kernel_table.make_table(libraries, TOOLS)


# -- the machine code ------------------------------------------------------------------------------


def forward_names(component: str) -> set[str]:
    grain = {"sta": 0, "vsa": 1}[component]
    return {f"forward_kernel<(Grain){grain}, {d}, {e}>" for d in HEAD_DIMS for e in ELEMENTS}


@needs_nvcc
@COMPONENTS
def test_forward_kernels_keep_everything_in_registers(component, kernels):
    """No spill, no stack; tensor cores fed by the copy engine; registers moved to the consumers."""
    forward = {n: k for n, k in kernels[component].items() if n.startswith("forward_kernel")}
    assert forward.keys() == forward_names(component)
    for name, kernel in forward.items():
        assert (kernel.stack, kernel.local, kernel.count("LDL", "STL")) == (0, 0, 0), name
        assert kernel.count("HGMMA") and kernel.count("UTMALDG"), name
        assert kernel.count("USETMAXREG") == 2, f"{name}: registers are not moved"


@needs_nvcc
@COMPONENTS
def test_backward_kernels_use_tensor_cores_and_the_copy_engine(component, kernels):
    backward = {n: k for n, k in kernels[component].items() if "backward_kernel<" in n}
    assert backward
    for name, kernel in backward.items():
        assert kernel.count("HGMMA") and kernel.count("UTMALDG"), name
        assert kernel.local == 0 and kernel.count("USETMAXREG") == 2, name


@needs_nvcc
@COMPONENTS
def test_kernels_stay_as_lean_as_in_the_table(component, table):
    """Regenerate after a change that is meant: python tools/kernel_table.py --write"""
    kept = json.loads(kernel_table.TABLE.read_text())
    if kept["cuda"] != table["cuda"]:
        pytest.skip(f"the table is of CUDA {kept['cuda']}, this is {table['cuda']}")
    assert table[component].keys() == kept[component].keys()
    for name, row in table[component].items():
        for figure, value in row.items():
            limit = kept[component][name][figure] * GROWTH
            assert value <= limit, f"{name}: {figure} grew from {limit / GROWTH:.0f} to {value}"


@needs_nvcc
@COMPONENTS
def test_kernels_fit_a_multiprocessor_and_leave_its_tensor_cores_busy(component, table):
    for name, row in table[component].items():
        assert row["registers"] * 384 <= 65536 and row["shared_bytes"] <= 227 * 1024, name
        assert row["local_accesses"] == 0, name
        if name.startswith("forward_kernel<(Grain)1"):  # lists of blocks of 64
            assert row["instructions_per_64_keys"] <= 190, name


# -- the libraries ---------------------------------------------------------------------------------


@needs_nvcc
@COMPONENTS
def test_needs_of_a_library(component, libraries):
    """Neither the driver nor a CUDA runtime nor torch's CUDA part: it loads everywhere."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf not found")
    command = ["readelf", "-d", "-W", str(libraries[component])]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic))
    allowed = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    system = {"libdl.so.2", "libpthread.so.0", "librt.so.1"}
    assert "libtorch_cpu.so" in needed
    assert {n for n in needed if not n.startswith("ld-linux")} <= allowed | system
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


OPERATORS = {
    "sta": {"hopper_coarse_forward", "hopper_coarse_backward"},
    "vsa": {"hopper_fine_forward", "hopper_fine_backward"},
}
PROGRAM = """
import json, sys, torch, video_attn
torch.ops.load_library(sys.argv[1])
ask = torch._C._dispatch_has_kernel_for_dispatch_key
names = ["hopper_" + g + "_" + w for g in ("coarse", "fine") for w in ("forward", "backward")]
print(json.dumps([name for name in names if ask("video_attn::" + name, "CUDA")]))
tensor = torch.zeros(1, 1, 64, 64, dtype=torch.float16)
try:
    torch.ops.video_attn.hopper_fine_forward(
        tensor, tensor, tensor, None, None, None, None, 0, 0, 1.0, tensor, tensor
    )
except NotImplementedError:
    print("not for the CPU")
"""


@needs_nvcc
@COMPONENTS
def test_each_library_loads_alone_and_implements_its_own_operators(component, libraries):
    """On any torch, CPU-only ones too; in a process of its own, since loading cannot be undone."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(libraries[component])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    registered, cpu = done.stdout.strip().splitlines()
    assert set(json.loads(registered)) == OPERATORS[component]
    assert cpu == "not for the CPU"


@pytest.mark.slow
@needs_nvcc
def test_both_components_compile_within_six_minutes(tmp_path):
    """From nothing, on two cores."""
    tree = copy_tree(tmp_path)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    try:
        done = run_setup(
            tree, "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), limit=360,
            VIDEO_ATTN_COMPONENTS="sta,vsa", VIDEO_ATTN_BUILD_EXT="1", MAX_JOBS="2",
        )  # fmt: skip
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stdout
    assert len(list((tmp_path / "lib" / "video_attn").glob("_*.so"))) == 2


# -- how machine code is read ----------------------------------------------------------------------

USAGE = """
 Function _Zkernel:
  REG:168 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:1408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = """
		Function : _Zkernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x0a */
                                                                                 /* 0x0e */
        /*0010*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;      /* 0x0 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;    /* 0x0 */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ;    /* 0x0 */
        /*0040*/                   LDL R4, [R1] ;                                /* 0x0 */
        /*0050*/              @!P0 BRA 0x20 ;                                    /* 0x0 */
        /*0060*/                   UTMALDG.4D [UR4], [UR6] ;                     /* 0x0 */
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;     /* 0x0 */
        /*0080*/                   STL [R1], R4 ;                                /* 0x0 */
        /*0090*/               @P1 BRA 0xb0 ;                                    /* 0x0 */
        /*00a0*/                   BRA 0x10 ;                                    /* 0x0 */
        /*00b0*/                   EXIT ;                                        /* 0x0 */
"""


def test_reading_of_machine_code():
    (kernel,) = parse_functions(USAGE, LISTING)
    assert kernel.symbol == "_Zkernel" and len(kernel.code) == 12
    assert (kernel.registers, kernel.stack, kernel.local) == (168, 16, 8)
    assert kernel.count("HGMMA") == 3 and kernel.count("LDL", "STL") == 2
    assert kernel.count("UTMALDG") == kernel.count("USETMAXREG") == 1
    assert [len(loop) for loop in kernel.loops()] == [4, 10]
    loop = kernel_table.main_loop(kernel)
    assert len(loop) == 4 and loop[-1].text == "@!P0 BRA 0x20"
    # 2 products of 64 x 128 x 16; 64 keys need 2 of 64 x 64 x 128, which is 4 times as many.
    name = "forward_kernel<(Grain)0, 128, __half>"
    assert kernel_table.per_64_keys(name, kernel) == {"instructions": 16, "hgmma": 8}


def test_what_a_vote_skips_is_not_of_the_usual_path():
    text = """HGMMA.64x128x16.F32 R24, gdesc[UR4]|VOTE.ANY P2, P0|@!P0 BRA 0x50|FADD R1, R2, R3
        @!P2 BRA 0x60|FMUL R1, R1, R2|FADD R2, R2, R1|@P1 BRA 0x0"""
    parts = [x.strip() for x in re.split(r"[|\n]", text)]
    code = [
        Instruction(16 * at, re.sub(r"@!?P\d ", "", x).split()[0], x) for at, x in enumerate(parts)
    ]
    (loop,) = Function("kernel", 1, 0, 0, tuple(code)).loops()
    left_out = [x.text for x in loop if x not in kernel_table.usual_path(loop)]
    assert left_out == ["FMUL R1, R1, R2"]


def test_a_kernel_without_a_loop_of_products_is_refused():
    kernel = Function("kernel", 1, 0, 0, (Instruction(0, "BRA", "BRA 0x0"),))
    with pytest.raises(ValueError, match="no loop with HGMMA"):
        kernel_table.main_loop(kernel)


def test_names_of_kernels():
    full = (
        "void video_attn::hopper::backward_kernel<video_attn::hopper::BackwardConfig<__half, 64, "
        "(video_attn::hopper::Walk)1, false> >(video_attn::hopper::BackwardGlobals)"
    )
    name = kernel_table.shorten(full)
    assert name == "backward_kernel<BackwardConfig<__half, 64, (Walk)1, false>>"
    kind = kernel_table.kind_of(name)
    assert (kind.head_dim, kind.products) == (64, 3)
    assert kind.shared_bytes == "BackwardConfig<__half, 64, (Walk)1, false>::kSharedBytes"
    assert kernel_table.kind_of(name.replace("(Walk)1", "(Walk)0")).products == 4
    fused = kernel_table.kind_of("backward_kernel<FusedConfig<__half>>")
    assert (fused.head_dim, fused.products) == (128, 5)
    with pytest.raises(ValueError, match="unknown kernel other_kernel<1>"):
        kernel_table.kind_of("other_kernel<1>")
