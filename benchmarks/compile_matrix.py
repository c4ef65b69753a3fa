"""Compiles the Triton kernels for chips that are not here, and prints what came of it.

    python benchmarks/compile_matrix.py [--arch sm_90,gfx942] [--kernel forward] [--head-dim 128]
                                        [--variant lens] [--cover] [--jobs 2] [--json FILE]

Every kernel, for every row of the launch tables and every chip: registers and spills per thread,
shared memory, and the matrix instruction. It needs no GPU; the launches are those of the backend
itself, on meta tensors. All of it takes an hour of two cores; ``--cover`` compiles the part that
every change is tested with.

Exit status 1 if a kernel does not compile or does not fit its chip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from compile_cases import (
    CODE_VARIANTS,
    POOL_KERNELS,
    QUANTIZERS,
    Case,
    case_launch,
    cover,
    full_matrix,
)
from rich.console import Console
from rich.table import Table

from video_attn.kernels.compile import compile_launch
from video_attn.kernels.launch_tables import (
    CODE_KERNELS,
    HEAD_DIMS,
    KERNELS,
    SHARED_MEMORY,
    LaunchRow,
)


@dataclass(frozen=True)
class Result:
    """What a compile gave; ``error`` is None when it succeeded.

    ``spills`` are bytes of local memory on NVIDIA, spilled vector registers on AMD.
    ``instruction``: the matrix instruction, and what it multiplies.
    """

    case: Case
    row: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instruction: str = ""
    seconds: float = 0.0
    error: str | None = None

    @property
    def fits(self) -> bool:
        return self.error is None and self.shared <= SHARED_MEMORY[self.case.arch]


def compile_case(case: Case, row: LaunchRow | None = None) -> Result:
    """Compiles a case, with the options of its table or with others, and reads the result."""
    start = time.perf_counter()
    try:
        launch = case_launch(case, row)
        compiled = compile_launch(launch, case.arch)
    except Exception as error:  # whatever the compiler raises is the result
        return Result(case, error=f"{type(error).__name__}: {error}")
    tile = " x ".join(str(launch.args[name]) for name in ("BM", "BN") if name in launch.args)
    options = " ".join(f"{name.replace('num_', '')} {x}" for name, x in launch.options.items())
    return Result(
        case,
        f"{tile}, {options}",
        *_resources(compiled, case.arch),
        seconds=time.perf_counter() - start,
    )


def _resources(compiled: Any, arch: str) -> tuple[int, int, int, str]:
    """(registers, spills, shared memory, matrix instruction)."""
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return registers, spills, compiled.metadata.shared, _instruction(text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared, _instruction(compiled.asm["ptx"])


def _instruction(text: str) -> str:
    """The newest kind of matrix instruction in PTX or AMD assembly, and the numbers it multiplies.

    "wgmma.mma_async int8 fp16"; without any, "".
    """
    found = set(
        re.findall(r"(?:tcgen05\.mma|wgmma\.mma_async|mma\.sync|v_mfma|v_wmma)[\w.:]*", text)
    )
    for kind in ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma", "v_wmma"):
        names = sorted(name for name in found if name.startswith(kind))
        if names:
            first = names[0] if kind.startswith("v_") else kind
            return " ".join([first, *sorted({_multiplied(name) for name in names})])
    return ""


def _multiplied(instruction: str) -> str:
    """What a matrix instruction multiplies."""
    parts = re.split(r"[._:]+", instruction)
    for name, words in (
        ("int8", ("s8", "i8", "iu8")),
        ("fp8", ("e4m3", "f8f6f4", "fp8")),
        ("bf16", ("bf16", "1k")),
        ("tf32", ("tf32", "xf32")),
        ("fp16", ("f16",)),
    ):
        if any(word in parts or parts[-1].endswith(word) for word in words):
            return name
    return "fp32"


def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def run(cases: Sequence[Case], jobs: int) -> Iterator[Result]:
    """Compiles in ``jobs`` processes; results in the order of the cases."""
    # Interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, cases)


# -- command line ---------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> Table:
    """Results as a table."""
    columns = ("chip", "kernel", "bytes", "head dim", "grain", "variant", "row", "registers")
    columns += ("spills", "shared KB", "instruction", "s")
    grid = Table(*columns)
    for x in results:
        figures = [str(x.registers), str(x.spills), f"{x.shared / 1024:.0f}", x.instruction]
        if not x.fits:
            figures[-1] = f"[red]{x.error or 'too much shared memory'}[/]"
        grid.add_row(*(str(value) for value in x.case), x.row, *figures, f"{x.seconds:.1f}")
    return grid


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, choices in (
        ("arch", tuple(SHARED_MEMORY)),
        ("kernel", (*KERNELS, *CODE_KERNELS, "prepare", *POOL_KERNELS, *QUANTIZERS)),
        ("head-dim", tuple(str(x) for x in HEAD_DIMS)),
        ("variant", CODE_VARIANTS),
    ):
        parser.add_argument(f"--{name}", help=f"only these, with commas: {', '.join(choices)}")
    parser.add_argument("--cover", action="store_true", help="rows of 16-bit numbers, codes; once")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    cases = list(cover() if options.cover else full_matrix())
    for name in ("arch", "kernel", "head_dim", "variant"):
        if getattr(options, name):
            wanted = getattr(options, name).split(",")
            cases = [case for case in cases if str(getattr(case, name)) in wanted]
    if not cases:
        parser.error("no case is left")
    results = list(run(cases, options.jobs))
    Console(width=None if sys.stdout.isatty() else 170).print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(x) for x in results], indent=1) + "\n")
    return 0 if all(x.fits for x in results) else 1


if __name__ == "__main__":
    sys.exit(main())
