"""The machine code of the Sage kernels and the libraries that hold it, read without a GPU.

What needs nvcc and a disassembler is skipped where they are not; sage_machine_code.py reads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sage_machine_code
from build_tree import copy_tree, run_setup
from machine_code import parse_functions

from video_attn.backends.cuda_sage import refuse_build

needs_nvcc = pytest.mark.skipif(
    sage_machine_code.missing() is not None, reason=str(sage_machine_code.missing())
)
GROWTH = 1.1


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, int]]]:
    return sage_machine_code.make_table(tmp_path_factory.mktemp("sage"))


# -- the kernels -----------------------------------------------------------------------------------

# Which tensor core instructions a recipe must use, and that nothing else multiplies.
EXPECTED = {
    "80": {"sage_fp16": {"IMMA", "HMMA"}},
    "89": {"sage_fp16": {"IMMA", "HMMA"}, "sage_fp8": {"IMMA", "QMMA"}, "fp8": {"QMMA"}},
    "90a": {"sage_fp16": {"IGMMA", "HGMMA"}, "sage_fp8": {"IGMMA", "QGMMA"}, "fp8": {"QGMMA"}},
}


@needs_nvcc
@pytest.mark.parametrize("arch", EXPECTED)
def test_each_recipe_multiplies_on_the_tensor_cores_it_is_for(arch, table):
    found: dict[str, set[str]] = {}
    for name, figures in table[arch].items():
        recipe = name.split()[1].rstrip(",")
        found.setdefault(recipe, set()).update(set(figures) & set(sage_machine_code.PRODUCTS))
    assert found == EXPECTED[arch]
    forms = {name.split()[0] for name in table[arch]}
    assert forms == {"warpgroup" if arch == "90a" else "mma.sync"}


@needs_nvcc
@pytest.mark.parametrize("arch", EXPECTED)
def test_main_loops_stay_in_registers(arch, table):
    """With 128 rows ``mma.sync`` keeps up to three loop constants in local memory: no accumulator.
    Shifted scores with FP8 values have registers for neither all weights nor all sums on 9.0."""
    for name, figures in table[arch].items():
        allowed = 3 if name.startswith("mma.sync") and "rows=128" in name else 0
        if name.startswith("warpgroup") and "fp8, shifted" in name:
            allowed = 30
        assert figures["local_accesses"] <= allowed, name


@pytest.mark.slow
@needs_nvcc
def test_quantizers_stay_in_registers(tmp_path):
    kept = json.loads(sage_machine_code.TABLE.read_text())[sage_machine_code.QUANTIZERS]
    table = sage_machine_code.make_quantizer_table(tmp_path)
    assert table.keys() == kept.keys()
    for name, figures in table.items():
        assert figures["registers"] <= 128 and figures["local_accesses"] == 0, name
        assert figures["instructions"] <= GROWTH * kept[name]["instructions"], name


@needs_nvcc
def test_kernels_stay_as_lean_as_in_the_table(table):
    """After a change that is meant to cost: python tests/sage_machine_code.py --write"""
    kept = json.loads(sage_machine_code.TABLE.read_text())
    del kept[sage_machine_code.QUANTIZERS]
    assert {arch: set(kernels) for arch, kernels in table.items()} == {
        arch: set(kernels) for arch, kernels in kept.items()
    }
    for arch, kernels in table.items():
        for name, figures in kernels.items():
            for figure in figures.keys() - {"local_accesses"}:
                limit = kept[arch][name][figure] * GROWTH
                assert figures[figure] <= limit, f"sm_{arch} {name}: {figure} {figures[figure]}"


def test_the_table_holds_its_goals():
    """What the design counts on: registers for the blocks of a multiprocessor, few instructions."""
    for name, figures in json.loads(sage_machine_code.TABLE.read_text())["90a"].items():
        if "shifted" in name:
            continue
        # 384 threads once, or 256 threads twice.
        assert figures["registers"] == (168 if "rows=128" in name else 128), name
        assert figures["local_accesses"] == 0 and figures["instructions_per_64_keys"] <= 420, name


# -- the reader itself -----------------------------------------------------------------------------

USAGE = """
 Function _ZHopperConfigILNS0_6QkCodeE0ELNS0_5VCodeE1ELi128ELi2EE:
  REG:168 STACK:0 SHARED:0 LOCAL:8 CONSTANT[0]:1408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
HEAD = "\n\t\tFunction : _ZHopperConfigILNS0_6QkCodeE0ELNS0_5VCodeE1ELi128ELi2EE\n"


def listing(*instructions: str) -> str:
    lines = [f"        /*{i * 16:04x}*/     {x} ;    /* 0x0 */" for i, x in enumerate(instructions)]
    return HEAD + "\n".join(lines)


def parse(text: str) -> list[sage_machine_code.Kernel]:
    return sage_machine_code.attention_kernels(parse_functions(USAGE, text))


def test_reading_of_machine_code():
    inner = ["IGMMA.64x128x32.S8.S8 R24, gdesc[UR4]"] * 8 + ["MUFU.EX2 R4, R5"] * 32
    code = ["LDC R1, c[0x0]", *inner, "LDL R4, [R1]", "@!P0 BRA 0x10", "STL [R1], R4", "BRA 0x0"]
    (kernel,) = parse(listing(*code))
    assert (kernel.name, kernel.step_tiles) == ("warpgroup sage_fp8 D=128 rows=128", 2)
    assert kernel.figures() == {
        "registers": 168, "local_bytes": 8, "instructions_per_64_keys": 21, "local_accesses": 1,
        "IGMMA": 8,
    }  # fmt: skip


def test_code_without_a_main_loop_is_refused():
    (kernel,) = parse(listing("IGMMA.64x128x32.S8.S8 R24", "BRA 0x10"))
    with pytest.raises(ValueError, match="no loop"):
        kernel.main_loop()
    assert parse(listing("EXIT")) == []


# -- what a build serves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "arch", "precision", "serves"),
    [
        (["80"], "sm_80", "sage_fp16", True),
        (["80"], "sm_86", "sage_fp16", True),
        (["80"], "sm_89", "sage_fp8", False),
        (["80"], "sm_120", "sage_fp16", True),
        (["80", "89"], "sm_89", "sage_fp8", True),
        (["80", "89"], "sm_90", "fp8", True),
        (["80", "89"], "sm_100", "sage_fp8", True),
        (["90a"], "sm_90", "sage_fp8", True),
        (["90a"], "sm_100", "sage_fp16", False),
        (["90a"], "sm_89", "sage_fp16", False),
        (["80", "90a"], "sm_120", "sage_fp8", False),
        (["80", "90a"], "sm_120", "sage_fp16", True),
        (["120f"], "sm_121", "sage_fp8", True),
        (["120f"], "sm_90", "sage_fp8", False),
        (["120a"], "sm_121", "sage_fp8", False),
    ],
)
def test_what_was_built_decides_what_is_served(architectures, arch, precision, serves):
    reason = refuse_build(architectures, arch, precision)
    assert (reason is None) is serves
    if not serves:
        assert ", ".join(architectures) in reason and arch in reason and precision in reason
        assert f"add {80 if precision == 'sage_fp16' else 89} to VIDEO_ATTN_CUDA_ARCHS" in reason


PROGRAM = """
import sys, torch, video_attn
torch.ops.load_library(sys.argv[1])
ask = torch._C._dispatch_has_kernel_for_dispatch_key
print([n for n in ("sage_quantize", "sage_attention") if ask("video_attn::" + n, "CUDA")])
"""


@pytest.mark.slow
@needs_nvcc
def test_a_library_for_every_architecture_builds_and_loads(tmp_path: Path):
    """Each kernel only in the code it is for: 90a beside 80, 89 and 120."""
    done = run_setup(
        copy_tree(tmp_path), "-q", "build_ext", "--build-lib", str(tmp_path / "lib"),
        VIDEO_ATTN_COMPONENTS="sage", VIDEO_ATTN_BUILD_EXT="1",
        VIDEO_ATTN_CUDA_ARCHS="80;89;90a;120",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    library = tmp_path / "lib/video_attn/_sage.so"
    loaded = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library)], capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "['sage_quantize', 'sage_attention']"
