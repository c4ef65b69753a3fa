"""The machine code of the Sage kernels: python tests/sage_machine_code.py [--write]

Compiles the kernels (no GPU needed), reads their machine code, and prints for each attention kernel
its registers, the instructions of its main loop per 64 keys, and the tensor core instructions among
them; for each quantizer its registers, instructions and accesses to local memory. `--write` keeps
the figures in tests/data/sage_kernels.json, against which a test compares the next build.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from build_plan import ROOT, BuildOptions, find_tools
from machine_code import Function, find_disassembler, read_functions

TABLE = ROOT / "tests/data/sage_kernels.json"
NVCC_FLAGS = (
    "-std=c++20", "-O3", "--extended-lambda", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc"),
)  # fmt: skip
QUANTIZERS = "90a quantizers"  # their entry in the table
PRODUCTS = ("IMMA", "HMMA", "QMMA", "IGMMA", "HGMMA", "QGMMA")
_CONFIG = re.compile(
    r"(Hopper|Attention)ConfigILNS0_6QkCodeE(\d)ELNS0_5VCodeE(\d)E(?:Lb(\d)E)?Li(\d+)ELi(\d)E(?:Lb(\d)E)?"
)
_QUANTIZER = re.compile(
    r"(Statistics|Finish|Quantize|ScoreShift)KernelILi(\d+)E(?:LNS0_6QkCodeE(\d)ELNS0_5VCodeE(\d)E)?"
)
_RECIPES = {"00": "sage_fp16", "01": "sage_fp8", "11": "fp8"}


class Kernel(NamedTuple):
    """Machine code of one attention kernel."""

    name: str
    step_tiles: int  # tiles of 64 keys that a turn of the main loop takes
    function: Function

    def main_loop(self) -> list[str]:
        """The mnemonics of the shortest loop that has both products and a step's exponentials.

        Turns that hide keys leave it by no branch, so the length counts them too.
        """
        loops = []
        for loop in self.function.loops():
            body = [step.mnemonic for step in loop]
            # 64 x 64 weights are 32 exponentials of a lane.
            products = sum(mnemonic in PRODUCTS for mnemonic in body)
            if products >= 8 and body.count("MUFU") >= 32:
                loops.append(body)
        if not loops:
            raise ValueError(f"{self.name}: no loop with products and exponentials")
        return min(loops, key=len)

    def figures(self) -> dict[str, int]:
        loop = self.main_loop()
        return {
            "registers": self.function.registers,
            "local_bytes": self.function.local,
            "instructions_per_64_keys": round(len(loop) / self.step_tiles),
            "local_accesses": loop.count("LDL") + loop.count("STL"),
            **{m: loop.count(m) for m in PRODUCTS if m in loop},
        }


def missing() -> str | None:
    """Why there is nothing to read here, or None."""
    nvcc = find_tools(BuildOptions.from_environment(os.environ)).nvcc
    if not nvcc:
        return "nvcc not found"
    found = find_disassembler(nvcc)
    return None if found else "cuobjdump and nvdisasm not found (triton has them)"


def compile_source(source: str, arch: str, folder: Path) -> list[Function]:
    """The functions of csrc/sage/``source`` for one architecture, as "80" or "90a"."""
    nvcc = find_tools(BuildOptions.from_environment(os.environ)).nvcc
    built = folder / f"{source}.{arch}.cubin"
    code = f"arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *NVCC_FLAGS, "-gencode", code, "-cubin", "-o", str(built)]
    done = subprocess.run(
        [*command, str(ROOT / "csrc/sage" / source)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return read_functions(built, str(find_disassembler(nvcc)))


def quantizers(functions: list[Function]) -> dict[str, dict[str, int]]:
    """Figures of the quantizers that this architecture has code for, by name."""
    found = {}
    for function in functions:
        config = _QUANTIZER.search(function.symbol)
        if config is not None and not function.count("BPT"):  # a trap: for other architectures
            form, dim, qk, v = config.groups()
            name = f"{form} {_RECIPES[qk + v]} D={dim}" if qk else f"{form} D={dim}"
            found[name] = {
                "registers": function.registers,
                "instructions": len(function.code),
                "local_accesses": function.count("LDL", "STL"),
            }
    return dict(sorted(found.items()))


def attention_kernels(functions: list[Function]) -> list[Kernel]:
    """Those that multiply on tensor cores, by name."""
    kernels = []
    for function in functions:
        config = _CONFIG.search(function.symbol)
        if config is not None and function.count(*PRODUCTS):
            tiles = 2 if config[1] == "Hopper" else 1
            kernels.append(Kernel(_name(config), tiles, function))
    return sorted(kernels, key=lambda kernel: kernel.name)


def _name(config: re.Match[str]) -> str:
    form, qk, v, half, dim, groups, shifted = config.groups()
    recipe = _RECIPES[qk + v]
    sums = ", half sums" if half == "1" else ""
    sums += ", shifted" if shifted == "1" else ""
    rows = 64 * int(groups)
    return f"{'warpgroup' if form == 'Hopper' else 'mma.sync'} {recipe}{sums} D={dim} rows={rows}"


# What the test compares: the kernels of the larger head dim, each on the architecture it is for.
COMPARED = (("attention_128.cu", "80"), ("attention_128.cu", "89"), ("hopper_128.cu", "90a"))


def make_table(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {attention kernel: figures}}."""
    return {
        arch: {k.name: k.figures() for k in attention_kernels(compile_source(source, arch, folder))}
        for source, arch in COMPARED
    }


def make_quantizer_table(folder: Path) -> dict[str, dict[str, int]]:
    """{quantizer: figures} for 90a; their compile takes as long as that of all others."""
    return quantizers(compile_source("quantize.cu", "90a", folder))


def main() -> int:
    if reason := missing():
        raise SystemExit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder)) | {QUANTIZERS: make_quantizer_table(Path(folder))}
    for arch, kernels in table.items():
        for name, figures in kernels.items():
            print(f"sm_{arch}  {name:48s}", " ".join(f"{k}={v}" for k, v in figures.items()))
    if "--write" in sys.argv[1:]:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
