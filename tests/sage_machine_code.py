"""The machine code of the Sage kernels: python tests/sage_machine_code.py [--write]

Compiles the attention kernels (no GPU needed), reads their machine code, and prints for each kernel
its registers, the instructions of its main loop per 64 keys, and the tensor core instructions among
them. `--write` keeps the figures in tests/data/sage_kernels.json, against which a test compares the
next build.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from build_plan import ROOT, BuildOptions, find_tools

TABLE = ROOT / "tests/data/sage_kernels.json"
NVCC_FLAGS = (
    "-std=c++20", "-O3", "--extended-lambda", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc"),
)  # fmt: skip
PRODUCTS = ("IMMA", "HMMA", "QMMA", "IGMMA", "HGMMA", "QGMMA")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);")
_BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
_MNEMONIC = re.compile(r"(?:@!?U?P\w+\s+)?(\w+)")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_CONFIG = re.compile(
    r"(Hopper|Attention)ConfigILNS0_6QkCodeE(\d)ELNS0_5VCodeE(\d)E(?:Lb(\d)E)?Li(\d+)ELi(\d)E"
)


class Kernel(NamedTuple):
    """Machine code of one attention kernel; ``code`` is (address, mnemonic, whole instruction)."""

    name: str
    step_tiles: int  # tiles of 64 keys that a turn of the main loop takes
    registers: int
    local_bytes: int
    code: list[tuple[int, str, str]]

    def count(self, *mnemonics: str) -> int:
        return sum(mnemonic in mnemonics for _, mnemonic, _ in self.code)

    def main_loop(self) -> list[str]:
        """The mnemonics of the shortest loop that has both products and a step's exponentials.

        Turns that hide keys leave it by no branch, so the length counts them too.
        """
        place = {address: i for i, (address, _, _) in enumerate(self.code)}
        loops = []
        for i, (_, _, text) in enumerate(self.code):
            branch = _BRANCH.search(text)
            start = place.get(int(branch[1], 16), i + 1) if branch else i + 1
            body = [mnemonic for _, mnemonic, _ in self.code[start : i + 1]]
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
            "registers": self.registers,
            "local_bytes": self.local_bytes,
            "instructions_per_64_keys": round(len(loop) / self.step_tiles),
            "local_accesses": loop.count("LDL") + loop.count("STL"),
            **{m: loop.count(m) for m in PRODUCTS if m in loop},
        }


def disassembler() -> str | None:
    """cuobjdump, with nvdisasm beside it: from PATH or of the triton package."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    nvcc = find_tools(BuildOptions.from_environment(os.environ)).nvcc
    folders += [str(Path(nvcc).resolve().parent)] if nvcc else []
    triton = find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        folders.append(f"{triton.submodule_search_locations[0]}/backends/nvidia/bin")
    for folder in folders:
        if shutil.which("cuobjdump", path=folder) and shutil.which("nvdisasm", path=folder):
            return f"{folder}/cuobjdump"
    return None


def missing() -> str | None:
    """Why there is nothing to read here, or None."""
    if not find_tools(BuildOptions.from_environment(os.environ)).nvcc:
        return "nvcc not found"
    return None if disassembler() else "cuobjdump and nvdisasm not found (triton has them)"


def compile_kernels(source: str, arch: str, folder: Path) -> list[Kernel]:
    """The kernels of csrc/sage/``source`` for one architecture, as "80" or "90a"."""
    nvcc = find_tools(BuildOptions.from_environment(os.environ)).nvcc
    built = folder / f"{source}.{arch}.cubin"
    code = f"arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *NVCC_FLAGS, "-gencode", code, "-cubin", "-o", str(built)]
    _run(*command, str(ROOT / "csrc/sage" / source))
    tool = str(disassembler())
    return parse(_run(tool, "-res-usage", str(built)), _run(tool, "-sass", str(built)))


def _run(*command: str) -> str:
    folder = str(Path(command[0]).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def parse(usage: str, listing: str) -> list[Kernel]:
    """From what cuobjdump prints for -res-usage and -sass, but for kernels without code."""
    resources = {m[1]: m for m in _USAGE.finditer(usage)}
    kernels = []
    for section in re.split(r"\n\s*Function : ", listing)[1:]:
        symbol, _, body = section.partition("\n")
        config = _CONFIG.search(symbol)
        if config is None:
            continue
        code = [
            (int(m[1], 16), _MNEMONIC.match(m[2])[1], m[2].strip())  # type: ignore[index]
            for m in _INSTRUCTION.finditer(body)
        ]
        used = resources[symbol.strip()]
        kernel = Kernel(
            _name(config), 2 if config[1] == "Hopper" else 1, int(used[2]), int(used[4]), code
        )
        if kernel.count(*PRODUCTS):
            kernels.append(kernel)
    return sorted(kernels)


def _name(config: re.Match[str]) -> str:
    form, qk, v, half, dim, groups = config.groups()
    recipe = {"00": "sage_fp16", "01": "sage_fp8", "11": "fp8"}[qk + v]
    sums = ", half sums" if half == "1" else ""
    rows = 64 * int(groups)
    return f"{'warpgroup' if form == 'Hopper' else 'mma.sync'} {recipe}{sums} D={dim} rows={rows}"


# What the test compares: the kernels of the larger head dim, each on the architecture it is for.
COMPARED = (("attention_128.cu", "80"), ("attention_128.cu", "89"), ("hopper_128.cu", "90a"))


def make_table(folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """{architecture: {kernel: figures}}."""
    return {
        arch: {k.name: k.figures() for k in compile_kernels(source, arch, folder)}
        for source, arch in COMPARED
    }


def main() -> int:
    if reason := missing():
        raise SystemExit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder))
    for arch, kernels in table.items():
        for name, figures in kernels.items():
            print(f"sm_{arch}  {name:48s}", " ".join(f"{k}={v}" for k, v in figures.items()))
    if "--write" in sys.argv[1:]:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
