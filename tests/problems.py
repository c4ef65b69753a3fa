"""Seeded random attention problems: what a kernel is given, and what it must answer.

A :class:`Problem` is a description with a readable name; ``build`` makes its tensors. The kernel is
given NaN wherever it has no business to read: keys that no list names, query and gradient rows past
their block's valid length, and the memory around strided views. The oracle is given the same values
without the poison.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import oracle
import token_masks
import torch
from problem_masks import VIDEO_KINDS, problem_masks
from torch import Tensor

from video_attn import BlockMask, attention
from video_attn.registry import backends

HEAD_DIMS = (
    (64, 64), (8, 8), (40, 40), (72, 72), (96, 96), (128, 128), (192, 128), (256, 256), (64, 96),
    (40, 8),
)  # fmt: skip
BLOCK_SIZES = (
    (64, 64), (16, 16), (8, 8), (128, 64), (64, 128), (100, 100), (16, 64), (384, 128), (8, 100),
    (384, 384),
)  # fmt: skip
TILES = (
    (4, 4, 4), (2, 3, 4), (2, 4, 5), (1, 8, 8), (4, 5, 5), (2, 8, 8), (2, 2, 2), (6, 8, 8),
)  # fmt: skip
HEADS = ((1, 1), (2, 1), (1, 2), (1, 4), (2, 2), (3, 1))  # key heads, queries per key head
MEMORIES = ("bhsd", "bshd", "bshd-api", "fused", "offset", "slack", "expanded")
SHORT = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Problem:
    """One random problem; everything about it follows from these fields.

    Args:
        kind: "lists" (random block lists); "sliding" and "selected" (windows of tiles, chosen tiles
            of a video with text in padded tile order); "dense"; "causal".
        lens: of the blocks of "lists": "none", "shared" or "per-batch".
        mask_batch, mask_heads: the mask has its own lists per batch, per head; else one for all.
        memory: how q, k and v lie in memory, one of ``MEMORIES``.
        logits: "normal", "peaked" (a large scale) or "shifted" (all scores far from 0).
        with_lse_grad: the loss uses lse too.
    """

    index: int
    seed: int
    kind: str
    dtype: torch.dtype
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    head_dim_v: int
    memory: str
    logits: str
    with_lse_grad: bool
    q_len: int
    kv_len: int
    q_block_size: int = 0
    kv_block_size: int = 0
    lens: str = "none"
    mask_batch: bool = False
    mask_heads: bool = False
    density: float = 1.0
    grid: token_masks.Triple = (1, 1, 1)
    tile: token_masks.Triple = (1, 1, 1)
    text_length: int = 0

    def __str__(self) -> str:
        shape = f"b{self.batch}h{self.kv_heads}x{self.group}-s{self.q_len}x{self.kv_len}"
        parts = [f"{self.index:03d}", self.kind, shape, f"d{self.head_dim}v{self.head_dim_v}"]
        if self.kind == "lists":
            parts += [f"q{self.q_block_size}k{self.kv_block_size}", f"lens_{self.lens}"]
        if self.kind in VIDEO_KINDS:
            parts += ["x".join(map(str, x)) for x in (self.grid, self.tile)] + [
                f"text{self.text_length}"
            ]
        return "-".join([*parts, self.memory, self.logits, SHORT[self.dtype]])

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Built:
        """The tensors, in ``dtype`` (default: the problem's own)."""
        return _build(self, torch.device(device), self.dtype if dtype is None else dtype)


@dataclass
class Built:
    """A problem with its tensors: an ``oracle.Question``, and what the kernel is given for it."""

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    token_mask: Tensor
    scale: float | None
    grad_out: Tensor | None
    grad_lse: Tensor | None
    mask: BlockMask | None
    kernel_inputs: tuple[
        Tensor, Tensor, Tensor
    ]  # strided and poisoned, in the layout of kernel_options
    kernel_grads: tuple[Tensor, Tensor]
    kernel_options: dict[str, Any] = field(default_factory=dict)


def run_attention(built: Built, backend: str | None = None, **options: Any) -> oracle.Result:
    """The package's answer, with gradients, as [B, H, S, D]."""
    q, k, v = (x.detach().requires_grad_() for x in built.kernel_inputs)
    out, lse = attention(
        q, k, v, built.mask, return_lse=True, backend=backend, **built.kernel_options, **options
    )
    grad_out, grad_lse = built.kernel_grads
    outputs, grads = [out], [grad_out]
    if built.problem.with_lse_grad:
        outputs, grads = [out, lse], [grad_out, grad_lse]
    tensors = [out, *torch.autograd.grad(outputs, (q, k, v), grads)]
    if built.kernel_options.get("layout") == "bshd":
        tensors = [x.transpose(1, 2) for x in tensors]
    return oracle.Result(tensors[0].detach(), lse.detach(), *tensors[1:])


def require_backend(name: str) -> None:
    """Fails, and does not skip, where the backend is absent or cannot run on this machine."""
    found = {b.name: b for b in backends()}
    assert name in found, f"backend {name!r} is not in the registry, only {', '.join(found)}"
    reason = found[name].available()
    assert reason is None, f"backend {name!r} cannot run here: {reason}"


# -- the generator ---------------------------------------------------------------------------------


def random_problems(
    count: int,
    *,
    seed: int,
    dtypes: Sequence[torch.dtype],
    max_len: int = 600,
    max_heads: int = 8,
    head_dims: Sequence[tuple[int, int]] = HEAD_DIMS,
) -> list[Problem]:
    """``count`` problems; each property is dealt from its own deck: all values come up alike."""
    rng = random.Random(seed)
    decks = {
        name: _deck(rng, values)
        for name, values in {
            "kind": ("lists",) * 6 + VIDEO_KINDS * 2 + ("dense", "causal"),
            "dtype": tuple(dtypes),
            "head_dims": tuple(head_dims),
            "batch": (1, 1, 2, 3),
            "heads": tuple((h, g) for h, g in HEADS if h * g <= max_heads),
            "memory": MEMORIES,
            "logits": ("normal", "normal", "peaked", "shifted"),
            "with_lse_grad": (True, False),
            "block_sizes": BLOCK_SIZES,
            "lens": ("none", "shared", "per-batch"),
            "mask_batch": (True, False),
            "mask_heads": (True, True, False),
            "density": (0.1, 0.3, 0.6, 1.0),
            "tile": tuple(t for t in TILES if math.prod(t) <= max_len),
            "text": (0, 0, 1, 13, 70),
        }.items()
    }
    return [_describe(index, rng, decks, max_len) for index in range(count)]


def _deck(rng: random.Random, values: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from rng.sample(values, len(values))


def _describe(
    index: int, rng: random.Random, decks: dict[str, Iterator[Any]], max_len: int
) -> Problem:
    kind = next(decks["kind"])
    common: dict[str, Any] = {
        name: next(decks[name]) for name in ("dtype", "batch", "memory", "logits", "with_lse_grad")
    }
    common["kv_heads"], common["group"] = next(decks["heads"])
    common["head_dim"], common["head_dim_v"] = next(decks["head_dims"])
    lengths = [
        rng.choice((rng.randint(1, max_len // 4), rng.randint(1, max_len))) for _ in range(2)
    ]
    if kind in VIDEO_KINDS:
        common |= _describe_video(rng, next(decks["tile"]), next(decks["text"]), max_len)
    elif kind == "lists":
        common["q_block_size"], common["kv_block_size"] = next(decks["block_sizes"])
        common["lens"] = next(decks["lens"])
    if kind == "lists" or kind in VIDEO_KINDS:
        common |= {name: next(decks[name]) for name in ("mask_batch", "mask_heads", "density")}
    if common["memory"] == "fused":  # one projection holds q, k and v: same tokens, same head dims
        lengths[1], common["head_dim_v"] = lengths[0], common["head_dim"]
    common = {"q_len": lengths[0], "kv_len": lengths[1]} | common
    return Problem(index=index, seed=rng.getrandbits(32), kind=kind, **common)


def _describe_video(
    rng: random.Random, tile: token_masks.Triple, text: int, max_len: int
) -> dict[str, Any]:
    """An odd grid whose padded tiles and text have at most ``max_len`` positions."""
    volume, tiles = math.prod(tile), [1, 1, 1]
    text = min(text, max_len - volume)
    room = rng.randint(1, max(1, (max_len - text) // volume))
    for _ in range(8):
        axis = rng.randrange(3)
        if math.prod(tiles) // tiles[axis] * (tiles[axis] + 1) <= room:
            tiles[axis] += 1
    grid = tuple(n * size - rng.randrange(size) for n, size in zip(tiles, tile, strict=True))
    length = math.prod(tiles) * volume + text
    return {
        "grid": grid, "tile": tile, "text_length": text, "q_len": length, "kv_len": length,
        "q_block_size": volume, "kv_block_size": volume,
    }  # fmt: skip


# -- tensors ---------------------------------------------------------------------------------------


def _build(problem: Problem, device: torch.device, dtype: torch.dtype) -> Built:
    rng = random.Random(problem.seed)
    generator = torch.Generator().manual_seed(problem.seed)
    token_mask, mask, blind_rows, listed_keys = problem_masks(problem, rng)
    heads = problem.kv_heads * problem.group
    shape = {
        "q": (problem.batch, heads, problem.q_len, problem.head_dim),
        "k": (problem.batch, problem.kv_heads, problem.kv_len, problem.head_dim),
        "v": (problem.batch, problem.kv_heads, problem.kv_len, problem.head_dim_v),
    }
    clean = {name: torch.randn(s, generator=generator).to(dtype) for name, s in shape.items()}
    scale = None
    if problem.logits == "peaked":
        scale = 2.5 / math.sqrt(problem.head_dim)
    elif problem.logits == "shifted":
        clean["q"] += 1.5
        clean["k"] -= 1.0
    if (
        problem.memory == "expanded"
    ):  # one key head in memory serves all, as MQA caches are often passed
        clean["k"], clean["v"] = (
            clean[n][:, :1].expand(-1, problem.kv_heads, -1, -1) for n in "kv"
        )
    grad_out = torch.randn(*shape["q"][:3], problem.head_dim_v, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_lse = torch.randn(shape["q"][:3], generator=generator).to(wide)

    blind_rows = blind_rows.expand(problem.batch, heads, -1)
    unseen = _unlisted_keys(listed_keys.expand(problem.batch, heads, -1), problem)
    given = {
        "q": clean["q"].masked_fill(blind_rows[..., None], torch.nan),
        "k": clean["k"].masked_fill(unseen[..., None], torch.nan),
        "v": clean["v"].masked_fill(unseen[..., None], torch.nan),
    }
    kernel_grads = (
        grad_out.masked_fill(blind_rows[..., None], torch.nan),
        grad_lse.masked_fill(blind_rows, torch.nan),
    )
    inputs = place(given, problem.memory, device)
    options: dict[str, Any] = {"scale": scale, "is_causal": problem.kind == "causal"}
    if problem.memory == "bshd-api":
        options["layout"] = "bshd"
        inputs = [x.transpose(1, 2) for x in inputs]
        kernel_grads = (kernel_grads[0].transpose(1, 2), kernel_grads[1])
    return Built(
        problem, *(clean[n].to(device) for n in "qkv"), token_mask.to(device), scale,
        grad_out.to(device), grad_lse.to(device) if problem.with_lse_grad else None,
        None if mask is None else mask.to(device),
        tuple(inputs), tuple(x.to(device) for x in kernel_grads), options,
    )  # fmt: skip


def _unlisted_keys(listed_keys: Tensor, problem: Problem) -> Tensor:
    """bool [B, Hkv, Sk]: keys in no list of their group's heads; equal for heads in one memory."""
    unseen = ~listed_keys.unflatten(1, (problem.kv_heads, problem.group)).any(2)
    if problem.memory == "expanded":
        unseen = unseen.all(1, keepdim=True).expand_as(unseen)
    return unseen


def place(tensors: dict[str, Tensor], memory: str, device: torch.device | str) -> list[Tensor]:
    """The tensors [B, H, S, D] at the strides of ``memory``; all slack around them is NaN."""
    if memory == "fused":
        heads = [x.shape[1] for x in tensors.values()]
        whole = torch.cat(list(tensors.values()), 1).transpose(1, 2).contiguous().to(device)
        return [x.transpose(1, 2) for x in whole.split(heads, 2)]
    if memory == "expanded":  # equal heads stand in memory once, with stride 0
        q, *shared = tensors.values()
        return [q.to(device), *(x[:, :1].to(device).expand(x.shape) for x in shared)]
    return [_place_one(x, memory, device) for x in tensors.values()]


def _place_one(x: Tensor, memory: str, device: torch.device | str) -> Tensor:
    if memory == "bhsd":
        return x.contiguous().to(device)
    if memory in ("bshd", "bshd-api"):
        return x.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    if (
        memory == "offset"
    ):  # starts in the middle of a storage, at an address that is no multiple of 16 bytes
        storage = torch.full((x.numel() + 7,), torch.nan, dtype=x.dtype, device=device)
        view = storage[3 : 3 + x.numel()].view(x.shape)
        return view.copy_(x)
    if memory == "slack":  # rows, tokens and heads of a larger tensor
        batch, heads, length, head_dim = x.shape
        room = torch.full(
            (batch + 1, heads + 1, length + 3, head_dim + 5),
            torch.nan,
            dtype=x.dtype,
            device=device,
        )
        return room[:batch, 1:, 2:-1, :head_dim].copy_(x)
    raise ValueError(f"memory must be one of {MEMORIES}, got {memory!r}")
