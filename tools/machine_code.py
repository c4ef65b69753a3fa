"""Machine code of CUDA kernels, read without a GPU by the disassembler of the toolkit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);")
_BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
_MNEMONIC = re.compile(r"(?:@!?U?P\w+\s+)?(\w+)")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """``text`` as it is printed, and its first word behind a predicate: "HGMMA", "BRA"."""

    address: int
    mnemonic: str
    text: str


@dataclass(frozen=True)
class Function:
    """A kernel.

    Args:
        symbol: its mangled name. registers: of a thread at launch.
        stack, local: bytes of a thread in local memory. code: in the order of addresses.
    """

    symbol: str
    registers: int
    stack: int
    local: int
    code: tuple[Instruction, ...]

    def count(self, *mnemonics: str) -> int:
        """Instructions of these kinds."""
        return sum(x.mnemonic in mnemonics for x in self.code)

    def loops(self) -> Iterator[tuple[Instruction, ...]]:
        """What lies between a jump backwards and its target."""
        places = {x.address: place for place, x in enumerate(self.code)}
        for place, x in enumerate(self.code):
            branch = _BRANCH.search(x.text)
            start = places.get(int(branch[1], 16)) if branch else None
            if start is not None and start <= place:
                yield self.code[start : place + 1]


def find_disassembler(nvcc: str) -> str | None:
    """cuobjdump, with nvdisasm beside it: of the toolkit, from PATH, or of the triton package."""
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    folders += os.get_exec_path()
    triton = find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        package = Path(triton.submodule_search_locations[0])
        folders.append(str(package / "backends" / "nvidia" / "bin"))
    for folder in folders:
        if shutil.which("cuobjdump", path=folder) and shutil.which("nvdisasm", path=folder):
            return str(Path(folder) / "cuobjdump")
    return None


def read_functions(path: Path, disassembler: str) -> list[Function]:
    """The kernels of a library or a cubin.

    Raises:
        subprocess.CalledProcessError: the disassembler cannot read it.
    """
    folders = os.pathsep.join([str(Path(disassembler).parent), *os.get_exec_path()])

    def output(option: str) -> str:
        command = [disassembler, option, str(path)]
        environment = {**os.environ, "PATH": folders}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    return parse_functions(output("-res-usage"), output("-sass"))


def parse_functions(usage: str, listing: str) -> list[Function]:
    """From the texts that cuobjdump prints for -res-usage and -sass."""
    resources = {m[1]: m for m in _USAGE.finditer(usage)}
    functions = []
    for section in re.split(r"\n\s*Function : ", listing)[1:]:
        symbol, _, body = section.partition("\n")
        used = resources[symbol.strip()]
        code = tuple(
            Instruction(int(m[1], 16), _MNEMONIC.match(m[2])[1], m[2].strip())  # type: ignore[index]
            for m in _INSTRUCTION.finditer(body)
        )
        sizes = (int(used[2]), int(used[3]), int(used[4]))
        functions.append(Function(symbol.strip(), *sizes, code))
    return functions
