"""Problems for the Triton quantizers and kernels over codes, and their codes as the reference's."""

from __future__ import annotations

import torch
from quantized_cases import random_mask
from torch import Tensor

from video_attn import BlockMask, VideoLayout
from video_attn.backends.triton import quantize_launches
from video_attn.kernels.codes import Codes
from video_attn.kernels.launch import run_launches
from video_attn.patterns.sliding_tile import sliding_tile_mask
from video_attn.patterns.video_sparse import selected_tiles_mask
from video_attn.quantize import QuantizationOptions, QuantizedInputs, fp8_dtype, scale_groups
from video_attn.quantized_reference import TilePlan, plan_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP8 = fp8_dtype(torch.cuda.get_device_properties(0).gcnArchName if torch.version.hip else "")
SCALE = 0.12


def qkv(
    lengths: tuple[int, int],
    dims: tuple[int, int] = (32, 32),
    heads: tuple[int, int] = (2, 2),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v; keys with an offset, so that smoothing has something to do."""
    generator = torch.Generator().manual_seed(sum(lengths) + dims[0])
    shapes = [(heads[0], lengths[0], dims[0])] + [(heads[1], lengths[1], d) for d in dims]
    q, k, v = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return tuple(x.to(DEVICE, dtype) for x in (q, k + 1, v))  # type: ignore[return-value]


def sta_mask() -> BlockMask:
    """Windows of 2 tiles of 32 tokens in a ragged grid, with valid text: lengths in every block."""
    layout = VideoLayout((5, 4, 7), (2, 4, 4), text_length=40)
    return sliding_tile_mask(layout, (2, 1, 2), text_length=20)


def vsa_mask() -> BlockMask:
    """Two of eight tiles of 64 tokens for each tile and head, none of them full."""
    layout = VideoLayout((7, 7, 7), (4, 4, 4))
    order = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return selected_tiles_mask(order[..., :2].sort(-1).values.int(), layout)


def problem(name: str) -> tuple[BlockMask | None, dict]:
    """A mask on the CPU, and the arguments of :func:`qkv` that go with it."""
    if name in ("sta", "vsa"):
        mask = sta_mask() if name == "sta" else vsa_mask()
        return mask, {"lengths": (mask.q_len, mask.kv_len)}
    blocks, shape = {
        "dense": (None, {"lengths": (130, 192), "dims": (64, 64)}),
        "causal": (None, {"lengths": (70, 130)}),
        "causal-more-queries": (None, {"lengths": (130, 70), "dims": (24, 40)}),
        "one-key": (None, {"lengths": (65, 1)}),
        "63-keys": (None, {"lengths": (64, 63), "dims": (72, 16)}),
        "64-keys": (None, {"lengths": (63, 64), "dims": (128, 8)}),
        "65-keys": (None, {"lengths": (1, 65), "dims": (16, 130)}),
        "lists": ((64, 64), {"lengths": (200, 333), "heads": (4, 2)}),
        "lists-lens": ((64, 128), {"lengths": (128, 250), "batch": 2, "heads": (2, 1)}),
        "lists-32": ((32, 96), {"lengths": (100, 200), "dims": (40, 24)}),
        "gather": ((100, 100), {"lengths": (190, 290)}),
        "gather-lens": ((16, 48), {"lengths": (60, 150), "heads": (2, 1)}),
    }[name]
    if blocks is None:
        return None, shape
    batch, heads = shape.get("batch", 1), shape.get("heads", (2, 2))[0]
    return random_mask(blocks, shape["lengths"], heads, "lens" in name, batch), shape


def quantized(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, precision: str,
    fp8: torch.dtype = FP8, **options: object,
) -> Codes:  # fmt: skip
    """Codes of q, k, v by the kernels."""
    chosen = QuantizationOptions(**options)  # type: ignore[arg-type]
    mask = None if mask is None else mask.to(DEVICE)
    codes, launches = quantize_launches(
        q, k, v, mask, scale=SCALE, precision=precision, options=chosen, fp8=fp8
    )
    run_launches(launches, DEVICE)
    return codes


def inputs_of(codes: Codes, plan: TilePlan, dims: tuple[int, int]) -> QuantizedInputs:
    """The codes in the form that the reference takes, on the CPU."""
    kv_len = plan.kv_tiling.length
    v = codes.v if codes.precision == "sage_fp16" else codes.v.mT[:, :, :kv_len]
    groups = [
        scale_groups(role, codes.options.granularity, tiling, torch.device("cpu"))[0]
        for role, tiling in (("q", plan.q_tiling), ("k", plan.kv_tiling))
    ]
    moved = {
        "q": codes.q[..., : dims[0]],
        "k": codes.k[..., : dims[0]],
        "v": v[..., : dims[1]],
        "q_scale": codes.q_scale,
        "k_scale": codes.k_scale,
        "v_scale": codes.v_scale[..., : dims[1]],
        "v_mean": None if codes.v_mean is None else codes.v_mean[..., : dims[1]],
        "lse_shift": codes.lse_shift,
        "score_shift": codes.score_shift,
    }
    moved = {name: x if x is None else x.cpu() for name, x in moved.items()}
    return QuantizedInputs(**moved, q_group=groups[0], k_group=groups[1])


def plan_of(mask: BlockMask | None, lengths: tuple[int, int]) -> TilePlan:
    return plan_tiles(mask, *lengths, torch.device("cpu"))
