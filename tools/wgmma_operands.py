"""Left operands of wgmma in registers, read from machine code: does a product get another's?

    python tools/wgmma_operands.py LIBRARY.so [FILE.cubin ...]

ptxas of CUDA 12.4 to 13.0 can give a left operand that stays in registers through a loop to another
left operand whose products have the same shape: the next step multiplies the wrong numbers. Source
and PTX are right, so only the machine code shows it. Products may share registers where each finds
what was written for it. What may not be: a product, reached from another one with no write of a
shared register in between, that on some other path reads a value which never reaches the first.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from build_plan import BuildOptions, find_tools
from machine_code import Function, Instruction, find_disassembler, read_functions

_PRODUCT = re.compile(r"[HQI]GMMA\S* R\d+, R(\d+), ")
_OPERAND_REGISTERS = 4  # of a thread: 64 x 16 values of 16 bits, or 64 x 32 of 8 bits
_TARGET = re.compile(r"\b0x([0-9a-f]+)$")
_PREDICATE = re.compile(r"@!?U?P\w+\s+")
_JUMPS = ("BRA", "JMP", "CALL", "WARPSYNC")
_RESULT_SECOND = ("SHFL", "ATOM", "ATOMG", "ATOMS")  # behind a predicate
_NO_RESULT = ("BAR", "BRX", "JMX", "RET", "CALL", "WARPSYNC", "BMOV", "R2P", "NANOSLEEP")


@dataclass(frozen=True)
class Clash:
    """`second` may multiply what was written for `first`, in some of their operand registers."""

    first: Instruction
    second: Instruction

    def __str__(self) -> str:
        places = [f"{x.text} at {x.address:#x}" for x in (self.second, self.first)]
        return " may read what was written for ".join(places)


def clashes(kernel: Function) -> list[Clash]:
    """Every pair of products of a kernel of which one may get the left operand of the other."""
    graph = _Graph.of(kernel)
    readers: dict[int, list[int]] = defaultdict(list)
    writers: dict[int, list[int]] = defaultdict(list)
    for place, instruction in enumerate(kernel.code):
        for register in operand_registers(instruction):
            readers[register].append(place)
        for register in written_registers(instruction):
            writers[register].append(place)
    found = {}
    for register, places in readers.items():
        if len(places) > 1:
            clashing = _clashes_of(places, writers[register], kernel, graph)
            found.update(dict.fromkeys(clashing))
    return sorted(found, key=lambda clash: clash.first.address)


def _clashes_of(
    readers: list[int], writes: list[int], kernel: Function, graph: _Graph
) -> Iterator[Clash]:
    """Of one register, by the places of the instructions that read and write it."""
    ends = {i for i in writes if not _PREDICATE.match(kernel.code[i].text)}
    reached = {place: graph.reached(place, ends) & set(readers) for place in readers}
    values: dict[int, set[int]] = {place: set() for place in readers}
    for write in writes:
        for place in graph.reached(write, ends) & set(readers):
            values[place].add(write)
    for first in readers:
        for second in sorted(reached[first] - {first}):
            if values[second] - values[first]:
                yield Clash(kernel.code[first], kernel.code[second])


def operand_registers(instruction: Instruction) -> range:
    """Those that hold the left operand of a product; none of other instructions."""
    match = _PRODUCT.search(instruction.text)
    return range(int(match[1]), int(match[1]) + _OPERAND_REGISTERS) if match else range(0)


def written_registers(instruction: Instruction) -> range:
    """The vector registers that an instruction writes."""
    name, _, rest = _PREDICATE.sub("", instruction.text).partition(" ")
    operands = [x.strip() for x in rest.split(",")]
    mnemonic, *modifiers = name.split(".")
    if mnemonic in _NO_RESULT:
        return range(0)
    result = operands[1] if mnemonic in _RESULT_SECOND and len(operands) > 1 else operands[0]
    match = re.fullmatch(r"R(\d+)", result)
    if match is None:
        return range(0)
    return range(int(match[1]), int(match[1]) + _result_width(mnemonic, modifiers))


def _result_width(mnemonic: str, modifiers: list[str]) -> int:
    if mnemonic.endswith("GMMA"):
        columns = int(modifiers[0].split("x")[1])
        return columns // 2 if modifiers[1] in ("F32", "S32") else columns // 4
    if mnemonic in ("HMMA", "IMMA", "QMMA") or "128" in modifiers:
        return 4
    if mnemonic == "LDSM":
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    wide = (
        "64" in modifiers or "WIDE" in modifiers or (mnemonic == "CS2R" and "32" not in modifiers)
    )
    return 2 if wide else 1


@dataclass
class _Graph:
    """What may run after what, by place in the code."""

    followers: list[tuple[int, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, kernel: Function) -> _Graph:
        places = {x.address: place for place, x in enumerate(kernel.code)}
        followers = []
        for place, instruction in enumerate(kernel.code):
            after = []
            text = instruction.text
            target = _TARGET.search(text) if instruction.mnemonic in _JUMPS else None
            if target is not None and int(target[1], 16) in places:
                after.append(places[int(target[1], 16)])
            ends = instruction.mnemonic in ("EXIT", "RET", "BRX") and not _PREDICATE.match(text)
            jumps = re.match(r"(BRA|JMP)(\.\w+)* 0x", text) is not None
            if not ends and not jumps and place + 1 < len(kernel.code):
                after.append(place + 1)
            followers.append(tuple(after))
        return cls(followers)

    def reached(self, start: int, ends: set[int]) -> set[int]:
        """Places that may run after `start` before one of `ends` has; these are among them."""
        found: set[int] = set()
        ahead = list(self.followers[start])
        while ahead:
            place = ahead.pop()
            if place in found:
                continue
            found.add(place)
            if place not in ends:
                ahead += self.followers[place]
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    nvcc = find_tools(BuildOptions.from_environment(os.environ)).nvcc
    disassembler = find_disassembler(nvcc)
    if disassembler is None:
        raise SystemExit("error: cuobjdump and nvdisasm not found (the triton package holds them)")
    wrong = 0
    for file in options.files:
        for kernel in read_functions(file, disassembler):
            found = clashes(kernel)
            wrong += bool(found)
            products = sum(bool(operand_registers(x)) for x in kernel.code)
            if products:
                print(f"{'WRONG' if found else 'right'} {products:3d} products  {kernel.symbol}")
            for clash in found:
                print(f"      {clash}")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
