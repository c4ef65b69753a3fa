"""BlockMask: which key blocks a query block sees. Patterns make it, kernels consume it.

Field names follow ``torch.nn.attention.flex_attention.BlockMask``. There are no element masks
inside a block: partial cover (ragged tiles, text padding, tails) is said by the number of valid
tokens per slot, valid tokens first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_lists import (
    covered_lens,
    dense_from_lists,
    lists_from_dense,
    pairs_of_lists,
    split_lens,
    valid_tokens,
    versions_of,
)
from .checks import as_int, check_int
from .mask_arguments import MaskArguments
from .mask_checks import check_list_tensor, check_mask
from .mask_text import describe, draw

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """For every query block an ascending list of the key blocks it sees. Immutable.

    Its tensors are read where they are. One may write into them between calls, if the mask is its
    own (:meth:`clone`): the next call, and the replay of a CUDA graph, sees the new lists. Masks of
    a pattern share theirs with every other mask of that pattern.

    Args:
        kv_num_blocks: int32 [B|1, H|1, Nq], length of each list. Dimensions of size 1 serve all
            batches or heads.
        kv_indices: int32 [B|1, H|1, Nq, Kmax], ascending; what stands past a list's length is never
            read.
        q_block_size, kv_block_size: tokens per block slot, any positive number.
        q_len, kv_len: tokens of the sequences; Nq = ceil(q_len / q_block_size), likewise for keys.
        q_block_lens, kv_block_lens: int32 [B|1, N], valid tokens of each slot (valid first), or
            None: all valid. The last slot also ends where the sequence ends.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together. Values are not
            read here: the lists may be on a GPU.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_block_size: int
    kv_block_size: int
    q_len: int
    kv_len: int
    q_block_lens: Tensor | None = None
    kv_block_lens: Tensor | None = None
    _transpose: tuple[Tensor, Tensor] | None = None
    _transposed_versions: tuple[int, ...] | None = field(default=None, init=False)  # of its source
    _transpose_is_derived: bool = field(default=False, init=False)  # made here, not given

    def __post_init__(self) -> None:
        for name in ("q_block_size", "kv_block_size", "q_len", "kv_len"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), 1))
        check_mask(self)
        versions = None
        if self._transpose is not None and not torch.compiler.is_compiling():
            versions = versions_of(self.kv_num_blocks, self.kv_indices)
        object.__setattr__(self, "_transposed_versions", versions)

    @classmethod
    def from_dense(
        cls,
        keep: Tensor,
        q_block_size: int,
        kv_block_size: int,
        q_block_lens: Tensor | None = None,
        kv_block_lens: Tensor | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> BlockMask:
        """Mask from a boolean block matrix ``keep`` [B|1, H|1, Nq, Nk]; True means the key block is
        seen.

        ``q_len`` and ``kv_len`` default to whole blocks. No host sync: Kmax is Nk; see
        :meth:`compact`.
        """
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            raise TypeError(f"keep must be a bool tensor, got {getattr(keep, 'dtype', type(keep))}")
        if keep.dim() != 4 or 0 in keep.shape:
            raise ValueError(f"keep must be [B|1, H|1, Nq, Nk], got {tuple(keep.shape)}")
        q_block_size = check_int("q_block_size", q_block_size, 1)
        kv_block_size = check_int("kv_block_size", kv_block_size, 1)
        kv_len = keep.shape[3] * kv_block_size if kv_len is None else check_int("kv_len", kv_len, 1)
        if -(-kv_len // kv_block_size) != keep.shape[3]:
            raise ValueError(
                f"kv_len {kv_len} in blocks of {kv_block_size} makes "
                f"{-(-kv_len // kv_block_size)} key blocks, "
                f"but keep has {keep.shape[3]}"
            )
        q_len = keep.shape[2] * q_block_size if q_len is None else q_len
        counts, indices = lists_from_dense(keep)
        return cls(
            counts, indices, q_block_size, kv_block_size, q_len, kv_len, q_block_lens, kv_block_lens
        )

    @classmethod
    def from_indices(
        cls,
        kv_indices: Tensor,
        q_block_size: int,
        kv_block_size: int,
        *,
        q_len: int,
        kv_len: int,
        kv_num_blocks: Tensor | None = None,
        q_block_lens: Tensor | None = None,
        kv_block_lens: Tensor | None = None,
    ) -> BlockMask:
        """Mask from ascending lists ``kv_indices`` int32 [B|1, H|1, Nq, K].

        Without ``kv_num_blocks`` all K entries of every row count.
        """
        check_list_tensor("kv_indices", kv_indices, 4, kv_indices)
        if kv_num_blocks is None:
            kv_num_blocks = kv_indices.new_full(kv_indices.shape[:-1], kv_indices.shape[-1])
        return cls(
            kv_num_blocks,
            kv_indices,
            q_block_size,
            kv_block_size,
            q_len,
            kv_len,
            q_block_lens,
            kv_block_lens,
        )

    @classmethod
    def from_flex(cls, mask: FlexBlockMask) -> BlockMask:
        """Mask from a FlexAttention BlockMask.

        Raises:
            TypeError: ``mask`` is something else.
            ValueError: a partial block of ``mask`` that is not "the first m queries see the first n
                keys": token masks inside a block are what these kernels do not do.
        """
        from .flex_interop import from_flex

        return from_flex(mask)

    def to_flex(self) -> FlexBlockMask:
        """The same mask for ``torch.nn.attention.flex_attention``."""
        from .flex_interop import to_flex

        return to_flex(self)

    def as_arguments(self, transposed: bool = False) -> MaskArguments:
        """The mask as operators take it; ``transposed``: with the lists of :meth:`transposed`.

        Lengths are contiguous, because they may be a part of longer ones.
        """
        q_num_blocks, q_indices = self.transposed() if transposed else (None, None)
        q_lens, kv_lens = self.q_block_lens, self.kv_block_lens
        return MaskArguments(
            self.kv_num_blocks, self.kv_indices, q_num_blocks, q_indices,
            None if q_lens is None else q_lens.contiguous(),
            None if kv_lens is None else kv_lens.contiguous(),
            self.q_block_size, self.kv_block_size,
        )  # fmt: skip

    @classmethod
    def from_arguments(cls, arguments: MaskArguments, q_len: int, kv_len: int) -> BlockMask | None:
        """What :meth:`as_arguments` was made of, unchecked; None for those of no mask."""
        if arguments.kv_num_blocks is None:
            return None
        transpose = arguments.transposed_lists
        return unchecked_mask(
            kv_num_blocks=arguments.kv_num_blocks,
            kv_indices=arguments.kv_indices,
            q_block_size=arguments.q_block_size,
            kv_block_size=arguments.kv_block_size,
            q_len=q_len,
            kv_len=kv_len,
            q_block_lens=arguments.q_block_lens,
            kv_block_lens=arguments.kv_block_lens,
            _transpose=None if transpose[0] is None else transpose,
            _transposed_versions=versions_of(*arguments.lists),
            _transpose_is_derived=False,
        )

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.q_block_size)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.kv_len // self.kv_block_size)

    @property
    def device(self) -> torch.device:
        return self.kv_num_blocks.device

    @property
    def batch(self) -> int:
        """Batch size said by the mask: 1 may mean "any"."""
        sizes = [self.kv_num_blocks.shape[0]]
        sizes += [x.shape[0] for x in (self.q_block_lens, self.kv_block_lens) if x is not None]
        return max(sizes)

    @property
    def kept_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it was given, for caches of masks."""
        given = self.kv_num_blocks, self.kv_indices, self.q_block_lens, self.kv_block_lens
        return tuple(x for x in (*given, *(self._given_transpose() or ())) if x is not None)

    def transposed(self) -> tuple[Tensor, Tensor]:
        """(q_num_blocks int32 [B|1, H|1, Nk], q_indices int32 [B|1, H|1, Nk, Nq]): who sees each
        key block.

        Ascending, deterministic, built on the device without a host sync, and kept for the next
        call, as long as nobody writes into the lists that it was made of.
        """
        kept = self._kept_transpose()
        if kept is not None:
            return kept
        if torch.compiler.is_compiling():
            return lists_from_dense(self.to_dense().transpose(-1, -2))
        versions = versions_of(self.kv_num_blocks, self.kv_indices)
        with torch.inference_mode(False):  # a training step may come later, and autograd saves it
            transpose = lists_from_dense(self.to_dense().transpose(-1, -2))
        keep = (
            versions is not None
            # Never a fake tensor for a real mask, and none of the memory of a CUDA graph.
            and type(transpose[0]) is type(self.kv_num_blocks)
            and not self._is_captured()
        )
        if keep:
            object.__setattr__(self, "_transpose", transpose)
            object.__setattr__(self, "_transposed_versions", versions)
            object.__setattr__(self, "_transpose_is_derived", True)
        return transpose

    def _kept_transpose(self) -> tuple[Tensor, Tensor] | None:
        """The lists of :meth:`transposed` that were given or kept, if they hold here.

        Compiled code and CUDA graphs run later, perhaps with other lists in the same memory: there
        the kept ones do not hold, and only a pattern's own do.
        """
        if self._transpose_is_derived and (torch.compiler.is_compiling() or self._is_captured()):
            return None
        return self._fresh_transpose()

    def _is_captured(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _given_transpose(self) -> tuple[Tensor, Tensor] | None:
        """What a mask that is derived from this one may take over."""
        return None if self._transpose_is_derived else self._fresh_transpose()

    @property
    def q_num_blocks(self) -> Tensor:
        return self.transposed()[0]

    @property
    def q_indices(self) -> Tensor:
        return self.transposed()[1]

    def to_dense(self) -> Tensor:
        """Block matrix bool [B|1, H|1, Nq, Nk]."""
        return dense_from_lists(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks)

    def to_token_mask(self) -> Tensor:
        """Token matrix bool [B|1, H|1, q_len, kv_len]; for small sizes and tests."""
        q_valid = valid_tokens(self.q_lens(), self.q_block_size, self.q_len)
        kv_valid = valid_tokens(self.kv_lens(), self.kv_block_size, self.kv_len)
        tokens = self.to_dense().repeat_interleave(self.q_block_size, -2)[..., : self.q_len, :]
        tokens = tokens.repeat_interleave(self.kv_block_size, -1)[..., : self.kv_len]
        return tokens & q_valid[:, None, :, None] & kv_valid[:, None, None, :]

    def q_lens(self) -> Tensor:
        """Valid query tokens per block, int32 [B|1, Nq], with the end of the sequence."""
        return covered_lens(self.q_block_lens, self.q_block_size, self.q_len, self.device)

    def kv_lens(self) -> Tensor:
        """Valid key tokens per block, int32 [B|1, Nk], with the end of the sequence."""
        return covered_lens(self.kv_block_lens, self.kv_block_size, self.kv_len, self.device)

    def refine(self, q_factor: int, kv_factor: int | None = None) -> BlockMask:
        """The same mask in blocks ``q_factor`` (and ``kv_factor``, default the same) times smaller.

        Raises:
            TypeError, ValueError: a factor that is no int, or does not divide its block size.
        """
        kv_factor = q_factor if kv_factor is None else kv_factor
        for name, size, factor in (
            ("q_factor", self.q_block_size, q_factor),
            ("kv_factor", self.kv_block_size, kv_factor),
        ):
            if as_int(factor) is None:
                raise TypeError(f"{name} must be an int, got {factor!r}")
            if factor < 1 or size % factor:
                raise ValueError(f"{name} must divide the block size {size}, got {factor}")
        q_size, kv_size = self.q_block_size // q_factor, self.kv_block_size // kv_factor
        nq, nk = -(-self.q_len // q_size), -(-self.kv_len // kv_size)
        dense = self.to_dense().repeat_interleave(q_factor, -2)[..., :nq, :]
        dense = dense.repeat_interleave(kv_factor, -1)[..., :nk]
        return BlockMask.from_dense(
            dense,
            q_size,
            kv_size,
            split_lens(self.q_block_lens, q_size, q_factor, nq),
            split_lens(self.kv_block_lens, kv_size, kv_factor, nk),
            q_len=self.q_len,
            kv_len=self.kv_len,
        )

    def compact(self) -> BlockMask:
        """The same mask with Kmax cut to its longest list. Reads one number back to the host."""
        longest = max(1, int(self.kv_num_blocks.max()))
        indices = self.kv_indices[..., :longest].contiguous()
        return replace(self, kv_indices=indices, _transpose=self._given_transpose())

    def with_lens(self, q_block_lens: Tensor | None, kv_block_lens: Tensor | None) -> BlockMask:
        """The same lists with other valid lengths: int32 [B|1, N] or None."""
        return replace(
            self, q_block_lens=q_block_lens, kv_block_lens=kv_block_lens,
            _transpose=self._given_transpose(),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        return self._map(lambda x: x.to(device))

    def clone(self) -> BlockMask:
        """The same mask in memory of its own, whose lists and lengths may be written to."""
        return replace(self._map(Tensor.clone), _transpose=None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> BlockMask:
        q_lens, kv_lens, transpose = self.q_block_lens, self.kv_block_lens, self._given_transpose()
        return replace(
            self,
            kv_num_blocks=change(self.kv_num_blocks),
            kv_indices=change(self.kv_indices),
            q_block_lens=None if q_lens is None else change(q_lens),
            kv_block_lens=None if kv_lens is None else change(kv_lens),
            _transpose=transpose and (change(transpose[0]), change(transpose[1])),
        )

    def of_heads(self, heads: slice) -> BlockMask:
        """The mask of some heads, in the same memory; all of it where one list serves all heads."""
        if self.kv_indices.shape[1] == 1:
            return self
        transpose = self._given_transpose()
        return replace(
            self,
            kv_num_blocks=self.kv_num_blocks[:, heads],
            kv_indices=self.kv_indices[:, heads],
            _transpose=transpose and (transpose[0][:, heads], transpose[1][:, heads]),
        )

    @property
    def keeps_transpose(self) -> bool:
        """Whether the lists of :meth:`transposed` are there already."""
        return self._kept_transpose() is not None

    @property
    def transpose_bytes(self) -> int:
        """Bytes of the lists of :meth:`transposed`: as wide as there are query blocks."""
        return 4 * math.prod(self.kv_num_blocks.shape[:2]) * self.num_kv_blocks * self.num_q_blocks

    def _fresh_transpose(self) -> tuple[Tensor, Tensor] | None:
        """The kept lists of :meth:`transposed`; None without any, or for older lists."""
        if torch.compiler.is_compiling():  # which cannot look at versions
            return self._transpose
        versions = versions_of(self.kv_num_blocks, self.kv_indices)
        return self._transpose if versions == self._transposed_versions else None

    def attended_pairs(self) -> int:
        """Query-key token pairs kept, summed over the mask's own batch and head dimensions."""
        return int(self.pairs_per_head().sum())

    def density(self) -> float:
        """Attended pairs over all pairs of valid queries and keys; 0 when there are none."""
        possible = self.q_lens().long().sum(-1) * self.kv_lens().long().sum(-1)
        pairs = self.pairs_per_head()
        total = int(possible.expand(pairs.shape[0]).sum()) * pairs.shape[1]
        return float(pairs.sum()) / total if total else 0.0

    def flops(self, head_dim: int, *, batch: int | None = None, heads: int | None = None) -> int:
        """Floating-point operations of the forward pass, 4 * D * pairs; the backward pass needs 2.5
        times that.

        Args:
            head_dim: D, or (D + Dv) / 2 where they differ.
            batch, heads: what a dimension of size 1 stands for; default 1.
        """
        pairs = self.pairs_per_head()
        batch_factor = (batch or 1) if pairs.shape[0] == 1 else 1
        head_factor = (heads or 1) if pairs.shape[1] == 1 else 1
        return 4 * head_dim * int(pairs.sum()) * batch_factor * head_factor

    def pairs_per_head(self) -> Tensor:
        """Token pairs kept, int64 [B|1, H|1]."""
        batch = max(self.batch, self.kv_indices.shape[0])
        q_lens, kv_lens = self.q_lens(), self.kv_lens()
        return pairs_of_lists(self.kv_num_blocks, self.kv_indices, q_lens, kv_lens, batch)

    def __repr__(self) -> str:
        return describe(self)

    def __str__(self) -> str:
        """:meth:`__repr__`, and a picture of the blocks. It reads the mask on the host."""
        return describe(self) + draw(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_transpose": self._given_transpose()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_transpose_is_derived": False})
        self.__post_init__()


def unchecked_mask(**fields: Any) -> BlockMask:
    """A mask of these fields as they are; the tensors of it that are optional may be left out."""
    mask: BlockMask = object.__new__(BlockMask)
    mask.__dict__.update(_OPTIONAL | fields)
    return mask


_OPTIONAL: dict[str, Any] = {
    "q_block_lens": None, "kv_block_lens": None,
    "_transpose": None, "_transposed_versions": None, "_transpose_is_derived": False,
}  # fmt: skip


def mask_arguments(mask: BlockMask | None, transposed: bool = False) -> MaskArguments:
    """:meth:`BlockMask.as_arguments`, and no arguments for no mask."""
    return MaskArguments() if mask is None else mask.as_arguments(transposed)
