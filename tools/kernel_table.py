"""What the Hopper kernels are in machine code: python tools/kernel_table.py [--write]

Builds the components `sta` and `vsa` (no GPU needed), reads their machine code, and prints for each
kernel its registers, shared memory and tensor core instructions, and how many instructions its main
loop takes per 64 keys (or queries) that a warpgroup works through, in steps that mend nothing.
`--write` keeps the figures in tests/data/hopper_kernels.json, against which a test compares the
next build.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_checks import KITTENS_HEADER, probe_nvcc
from build_plan import ROOT, BuildOptions, Tools, find_tools
from machine_code import Function, Instruction, find_disassembler, read_functions

TABLE = ROOT / "tests" / "data" / "hopper_kernels.json"
COMPONENTS = ("sta", "vsa")
_PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x16\.")
_VOTE = re.compile(r"^VOTE\.ANY (P\d),")
_SKIP = re.compile(r"^@!(P\d) BRA 0x([0-9a-f]+)")


def main_loop(kernel: Function) -> tuple[Instruction, ...]:
    """The shortest loop that multiplies on tensor cores: what runs where no mask is needed.

    Raises:
        ValueError: there is none.
    """
    paths = map(usual_path, kernel.loops())
    loops = [x for x in paths if any(_PRODUCT.search(step.text) for step in x)]
    if not loops:
        raise ValueError(f"{kernel.symbol}: no loop with HGMMA instructions")
    return min(loops, key=len)


def usual_path(loop: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """A loop without what warps jump over when they vote that nothing has to be mended."""
    path, vote, end = [], None, 0
    for step in loop:
        if step.address < end:
            continue
        path.append(step)
        if found := _VOTE.search(step.text):
            vote = found[1]
        elif (jump := _SKIP.match(step.text)) and jump[1] == vote:
            target = int(jump[2], 16)
            if step.address < target <= loop[-1].address:
                vote, end = None, target
    return tuple(path)


@dataclass(frozen=True)
class Kind:
    """What follows from the name of a kernel.

    Args:
        head_dim: channels in shared memory. products: of 64 x 64 x head_dim for 64 rows and 64
            keys.
        shared_bytes: C++ that gives its dynamic shared memory.
    """

    head_dim: int
    products: int
    shared_bytes: str


def kind_of(name: str) -> Kind:
    """The scores and their product with v; backward: the scores again, and the gradients made.

    Raises:
        ValueError: a kernel that this file does not know.
    """
    if m := re.fullmatch(r"forward_kernel<(\(Grain\)\d), (\d+), \w+>", name):
        return Kind(int(m[2]), 2, f"forward_config({m[1]}, {m[2]}).shared_bytes()")
    if m := re.fullmatch(r"\w+<(BackwardConfig<\w+, (\d+), \(Walk\)([01]), \w+>)>", name):
        return Kind(int(m[2]), {"0": 4, "1": 3}[m[3]], f"{m[1]}::kSharedBytes")
    if m := re.fullmatch(r"\w+<(FusedConfig<\w+>)>", name):
        return Kind(128, 5, f"{m[1]}::kSharedBytes")
    raise ValueError(f"unknown kernel {name}: say in kind_of() what it is")


def per_64_keys(name: str, kernel: Function) -> dict[str, int]:
    """Main loop of a warp: all instructions, and tensor core ones, per 64 keys (or queries)."""
    loop, kind = main_loop(kernel), kind_of(name)
    columns = [int(m[1]) for m in (_PRODUCT.search(step.text) for step in loop) if m]
    # 64 x columns x 16 each.
    share = 64 * kind.head_dim * kind.products / (16 * sum(columns))
    return {"instructions": round(len(loop) * share), "hgmma": round(len(columns) * share)}


# -- reading a library -----------------------------------------------------------------------------


def read_kernels(library: Path, disassembler: str) -> dict[str, Function]:
    """Every kernel of a library, by its short name."""
    found = {demangle(f.symbol): f for f in read_functions(library, disassembler)}
    return dict(sorted(found.items()))


def demangle(symbol: str) -> str:
    """The short name of a kernel: forward_kernel<(Grain)0, 128, __half>."""
    done = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True)
    return shorten(done.stdout.strip())


def shorten(name: str) -> str:
    name = re.sub(r"\b(?:video_attn::hopper|video_attn|kittens)::", "", name)
    return re.sub(r"\([\w<>]+\)$", "", name.removeprefix("void ")).replace("> >", ">>")


# -- the table -------------------------------------------------------------------------------------


def missing_tool(tools: Tools) -> str | None:
    """Why there is nothing to read on this machine, or None."""
    if not tools.nvcc:
        return "nvcc not found"
    if not tools.thunderkittens or not (Path(tools.thunderkittens) / KITTENS_HEADER).is_file():
        return "ThunderKittens not found: git submodule update --init, or THUNDERKITTENS_ROOT"
    if shutil.which("c++filt") is None or find_disassembler(tools.nvcc) is None:
        return "cuobjdump, nvdisasm or c++filt not found (the triton package holds the first two)"
    return None


def build_libraries(folder: Path, limit: float | None = None) -> dict[str, Path]:
    """Compile the components into `folder`; what is compiled already is taken from build/native.

    Raises:
        RuntimeError: the build fails; with its output. subprocess.TimeoutExpired: after `limit` s.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    environment = {
        **os.environ,
        "VIDEO_ATTN_COMPONENTS": ",".join(COMPONENTS),
        "VIDEO_ATTN_BUILD_EXT": "1",
    }
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )
    if done.returncode:
        raise RuntimeError(done.stdout)
    return {name: folder / "video_attn" / f"_{name}.so" for name in COMPONENTS}


def shared_memory(names: Sequence[str], tools: Tools) -> dict[str, int]:
    """Bytes of dynamic shared memory of each kernel, asked from the headers by a small program."""
    prints = "\n".join(
        f'  std::printf("%d\\n", static_cast<int>({kind_of(name).shared_bytes}));' for name in names
    )
    program = (
        "#include <cstdio>\n"
        '#include "hopper/backward_config.h"\n#include "hopper/config.h"\n'
        f"using namespace video_attn::hopper;\nint main() {{\n{prints}\n}}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "shared_memory.cu", Path(folder) / "shared_memory"
        source.write_text(program)
        command = [tools.nvcc, "-std=c++20", "--expt-relaxed-constexpr", "--extended-lambda"]
        command += ["-gencode", "arch=compute_90a,code=sm_90a", "-DKITTENS_HOPPER"]
        command += ["-I", str(ROOT / "csrc"), "-isystem", f"{tools.thunderkittens}/include"]
        subprocess.run([*command, str(source), "-o", str(binary)], check=True)
        answer = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(int, answer.split()), strict=True))


def rows_of(
    kernels: Mapping[str, Function], shared: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """The figures of each kernel that uses tensor cores, by name."""
    return {
        name: {
            "registers": kernel.registers,
            "shared_bytes": shared[name],
            "local_accesses": kernel.count("LDL", "STL"),
            "hgmma": kernel.count("HGMMA"),
            **{f"{what}_per_64_keys": n for what, n in per_64_keys(name, kernel).items()},
        }
        for name, kernel in kernels.items()
        if kernel.count("HGMMA")
    }


def make_table(libraries: Mapping[str, Path], tools: Tools) -> dict[str, Any]:
    """{"cuda": version of the compiler, component: {kernel: figures}}."""
    disassembler = find_disassembler(tools.nvcc)
    if disassembler is None:
        raise RuntimeError(str(missing_tool(tools)))
    found = {name: read_kernels(path, disassembler) for name, path in libraries.items()}
    used = [name for x in found.values() for name, kernel in x.items() if kernel.count("HGMMA")]
    shared = shared_memory(sorted(set(used)), tools)
    version = ".".join(map(str, probe_nvcc(tools.nvcc)))
    return {
        "cuda": version,
        **{name: rows_of(kernels, shared) for name, kernels in found.items()},
    }


def print_table(table: Mapping[str, Any]) -> None:
    """One line per kernel."""
    for component in COMPONENTS:
        rows = table[component]
        columns = list(next(iter(rows.values())))
        print(f"{component}, CUDA {table['cuda']}: {', '.join(columns)}")
        for name, row in rows.items():
            print("  " + " ".join(f"{row[column]:7d}" for column in columns) + f"  {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"keep them in {TABLE.name}")
    options = parser.parse_args()
    tools = find_tools(BuildOptions.from_environment(os.environ))
    reason = missing_tool(tools)
    if reason is not None:
        raise SystemExit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(build_libraries(Path(folder)), tools)
    print_table(table)
    if options.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
