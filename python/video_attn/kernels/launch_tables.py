"""Launch options of the attention kernels: which tile, step, warps and stages on which chip.

The tables are data, one file per vendor. ``benchmarks/tune_triton.py`` times candidates on a GPU,
``benchmarks/compile_matrix.py`` shows what the compiler makes of every row for every chip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from . import launch_tables_amd as amd
from . import launch_tables_nvidia as nvidia

_SMALLEST = 16  # rows of a tile or step

KERNELS = ("forward", "dq", "dkv")
ITEMSIZES = (2, 4)
# Forward over codes: tables name it by its precision, and its numbers have one byte (Q and K).
FP8_PRECISIONS = ("sage_fp8", "fp8")
CODE_KERNELS = ("sage_fp16", *FP8_PRECISIONS)
HEAD_DIMS = (64, 128, 256)  # a row serves head dims up to its own
GRAINS = (64, 128)  # slots shorter than 128 tokens; slots of 128 and more, and no mask
SHARED_MEMORY = {**nvidia.SHARED_MEMORY, **amd.SHARED_MEMORY}  # bytes a program can have


class LaunchRow(NamedTuple):
    """Options of one launch.

    Args:
        own: rows of the tile that a program owns. step: rows of a step over the other side.
        num_warps, num_stages: as Triton means them.
        vendor: options that only the compiler of this chip's vendor knows.
        packed: whether strides of rows that follow one another are compiled in: fewer registers and
            a tenth fewer instructions in a step, but not always a faster kernel.
        products: how fp32 numbers are multiplied, as ``tl.dot`` calls it.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int
    vendor: tuple[tuple[str, int], ...] = ()
    packed: bool = False
    products: str = "ieee"

    def options(self) -> dict[str, int]:
        """Keywords of the kernel launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **dict(self.vendor)}

    def fitted(self, own_slot: int, step_slot: int | None = None) -> LaunchRow:
        """This row for small slots: a tile does not exceed its slot, a step divides its slot.

        Neither gets smaller than the matrix units take. A step that does not divide its slot even
        when halved stays as it is: the kernel then gathers rows.
        """
        own, step = self.own, self.step
        while own > _SMALLEST and own // 2 >= own_slot:
            own //= 2
        half = max(_SMALLEST, step // 2)
        if step_slot is not None and step_slot % step != 0 and step_slot % half == 0:
            step = half
        warps = min(self.num_warps, max(2, self.num_warps * own // self.own))
        return self._replace(own=own, step=step, num_warps=warps)


Table = Mapping[tuple[str, int, int], tuple[LaunchRow, LaunchRow]]


def _table(rows: Mapping, options: tuple[str, ...], fp32_products: Mapping[int, str]) -> Table:
    """LaunchRows of a table. options: what may follow in its rows; fp32_products: by head dim."""

    def launch_row(row: tuple[int, ...], products: str) -> LaunchRow:
        given = dict(zip(options, row[4:], strict=False))
        packed = bool(given.pop("packed", 0))
        vendor = tuple((name, x) for name, x in given.items() if x)
        return LaunchRow(*row[:4], vendor=vendor, packed=packed, products=products)

    table = {}
    for (kernel, itemsize, head_dim), pair in rows.items():
        products = fp32_products.get(head_dim, "ieee") if itemsize == 4 else "ieee"
        fine, coarse = (launch_row(row, products) for row in pair)
        table[kernel, itemsize, head_dim] = fine, coarse
    return table


TABLES: Mapping[str, Table] = {
    **{
        name: _table(rows, nvidia.OPTIONS, nvidia.FP32_PRODUCTS.get(name, {}))
        for name, rows in nvidia.ROWS.items()
    },
    **{name: _table(rows, amd.OPTIONS, {}) for name, rows in amd.ROWS.items()},
    "interpreter": {
        (kernel, itemsize, head_dim): (LaunchRow(64, 64, 4, 1), LaunchRow(128, 64, 4, 1))
        for kernel in KERNELS
        for itemsize in ITEMSIZES
        for head_dim in HEAD_DIMS
    }
    | {
        (kernel, 1, head_dim): (LaunchRow(64, 64, 4, 1), LaunchRow(128, 64, 4, 1))
        for kernel in CODE_KERNELS
        for head_dim in HEAD_DIMS
    },
}


def family(arch: str) -> str | None:
    """The table that serves a chip, None when there is none."""
    return nvidia.FAMILIES.get(arch) or amd.FAMILIES.get(arch)


def unsupported_arch(arch: str) -> str | None:
    """Why there are no launch options for a chip; None when there are."""
    if family(arch) is None:
        return f"{arch} is not one of {', '.join((*nvidia.FAMILIES, *amd.FAMILIES))}"
    return None


def unsupported_precision(arch: str, precision: str) -> str | None:
    """Why a chip of a table has no kernel for a quantized precision; None when it has."""
    if precision in FP8_PRECISIONS and arch not in (*nvidia.FP8_CHIPS, *amd.FP8_CHIPS):
        return f"precision {precision!r}: {arch} has no FP8 matrix units"
    return None


def launch_row(
    arch: str,
    kernel: str,
    head_dim: int,
    itemsize: int,
    grain: int | None,
    *,
    vectors: bool = True,
) -> LaunchRow:
    """The options of a launch.

    Args:
        arch: of a chip in a table; kernels for any other run in the interpreter.
        kernel: one of ``KERNELS`` or ``CODE_KERNELS``. head_dim: the larger of D and DV.
        itemsize: bytes of a number of Q and K.
        grain: tokens of the shorter slots of the mask; None without a mask.
        vectors: whether the tensors are read in vectors, see ``launch.reads_vectors``; fp32 ones
            whose head dims differ are to be taken as if not.
    """
    bucket = next(size for size in HEAD_DIMS if head_dim <= size)
    fine, coarse = TABLES[family(arch) or "interpreter"][kernel, itemsize, bucket]
    row = fine if grain is not None and grain < GRAINS[1] else coarse
    on_tensor_cores = itemsize == 2 or row.products != "ieee"
    if not vectors and on_tensor_cores and family(arch) in nvidia.DESCRIPTORS:
        return row._replace(own=min(row.own, 32), step=min(row.step, 32), num_warps=4)
    return row
