"""INT8 and FP8 recipes: q, k, v become codes with scales. The definition, in plain torch.

Every quantized kernel is tested against these functions, so they say everything exactly, in fp32:

- A sequence is cut into tiles of 64 tokens, starting afresh in each block slot of the mask
  (:class:`Tiling`).
- Q and K: a group of tokens shares one scale, ``scale = amax / limit`` (limit 127 for INT8, the
  largest finite value for FP8), and ``code = x * (limit / amax)``, rounded to nearest, ties to
  even.
- V: a scale per channel. For FP8 PV ``scale = amax / limit``; for fp16 PV a power of two that
  brings the channel's amax into [256, 512), so that no value overflows and small ones keep their
  digits.
- A group or channel whose amax is below 2^-100 has scale 0 and codes 0. One that holds inf or NaN
  has that as its scale and codes 0, so that the output shows it: nothing becomes finite in silence.
- Tokens past a valid length, whatever they hold, have code 0 and count in no amax and no mean.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_bool

TILE = 64  # tokens: one step over the keys, and the unit of the scale groups
QUANTIZED_PRECISIONS = ("sage_fp16", "sage_fp8", "fp8")
GRANULARITIES = ("per_head", "per_block", "per_warp", "per_thread")
PV_ACCUMULATIONS = ("fp32", "fp16+fp32", "fp32+fp16")
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
LOG2E = math.log2(math.e)
_INT8_LIMIT = 127.0
_FP16_MAX = 65504.0
_SMALLEST_AMAX = 2.0**-100  # below it limit / amax could overflow; such a group is zero


@dataclass(frozen=True)
class QuantizationOptions:
    """The choices within a quantized precision.

    Args:
        granularity: tokens that share a scale. "per_head": all of a head. "per_block": a tile of
            64. "per_warp": 16 queries, 64 keys. "per_thread": the 2 queries (t, t + 8 of 16) and
            the 16 keys (8i + 2t, 8i + 2t + 1 of 64) that a lane of a tensor core warp holds: the
            finest, and free in CUDA kernels.
        smooth_k: subtract from K its mean over the valid keys, per batch, kv head and channel.
            Softmax does not see it; the lse is corrected exactly.
        smooth_q: subtract from each tile of 64 queries its mean; the lost part of the scores is
            added back, exactly, in fp32.
        hadamard: rotate Q and K by a normalised Hadamard matrix, which spreads outlier channels and
            leaves the scores as they are. head_dim must be a multiple of 16.
        smooth_v: subtract from V its mean per channel and add it to the output.
        pv_accumulation: of P V within a tile; between tiles it is always fp32. "fp32", "fp16+fp32"
            (sage_fp16: sums of 16 products added in fp16), "fp32+fp16" (sage_fp8 and fp8: sums of
            32 products added in fp16, V scaled so that 64 of them cannot overflow).
        straight_through: differentiate as if nothing were rounded: the gradients of unquantized
            attention over the caller's q, k, v, with the quantized out and lse. False: a call that
            is to be differentiated is refused.

    Raises:
        TypeError, ValueError: an unknown option, a value of the wrong type or not in the lists
            above.
    """

    granularity: str = "per_warp"
    smooth_k: bool = True
    smooth_q: bool = False
    hadamard: bool = False
    smooth_v: bool = False
    pv_accumulation: str = "fp32"
    straight_through: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("granularity", GRANULARITIES),
            ("pv_accumulation", PV_ACCUMULATIONS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {value!r}")
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        for name in ("smooth_k", "smooth_q", "hadamard", "smooth_v", "straight_through"):
            check_bool(name, getattr(self, name))


# Read once, here: torch.compile does not trace dataclasses.fields.
_DEFAULTS = tuple((field.name, field.default) for field in dataclasses.fields(QuantizationOptions))


def check_recipe(precision: str, options: QuantizationOptions, head_dim: int) -> None:
    """Refuse combinations that no kernel could honour.

    Raises:
        ValueError: the precision is not a quantized one, or the options do not fit it or the
            head_dim.
    """
    if precision not in QUANTIZED_PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(QUANTIZED_PRECISIONS)}; got {precision!r}"
        )
    allowed = ("fp32", "fp16+fp32" if precision == "sage_fp16" else "fp32+fp16")
    if options.pv_accumulation not in allowed:
        raise ValueError(
            f"pv_accumulation must be {' or '.join(allowed)} for precision {precision!r}; "
            f"got {options.pv_accumulation!r}"
        )
    if options.hadamard and head_dim % 16:
        raise ValueError(f"hadamard needs a head_dim that is a multiple of 16, got {head_dim}")


def with_straight_through(options: QuantizationOptions | None) -> QuantizationOptions:
    """The options, or the defaults, with ``straight_through``."""
    given = {} if options is None else {name: getattr(options, name) for name, _ in _DEFAULTS}
    return QuantizationOptions(**{**given, "straight_through": True})


def is_differentiable(precision: str, options: QuantizationOptions | None) -> bool:
    """Whether a call has derivatives: exact ones, or those of ``straight_through``."""
    return precision == "native" or (options is not None and options.straight_through)


def recipe_text(precision: str, options: QuantizationOptions | None) -> str:
    """A precision and its options as one string, the form in which torch operators take them.

    "sage_fp8" stands for the default options; others are listed:
    "sage_fp8:granularity=per_block,smooth_k=False".
    """
    changed = [
        f"{name}={getattr(options, name)}"
        for name, default in _DEFAULTS
        if options is not None and getattr(options, name) != default
    ]
    return f"{precision}:{','.join(changed)}" if changed else precision


def parse_recipe(text: str) -> tuple[str, QuantizationOptions | None]:
    """The precision and the options of :func:`recipe_text`; options are None for a precision
    without any.

    Raises:
        TypeError, ValueError: an unknown option, or one with a value that is not allowed.
    """
    return _parse_recipe(text)


@functools.lru_cache(maxsize=256)
def _parse_recipe(text: str) -> tuple[str, QuantizationOptions | None]:
    precision, _, listed = text.partition(":")
    if precision not in QUANTIZED_PRECISIONS:
        if listed:
            raise ValueError(f"precision {precision!r} takes no options, got {listed!r}")
        return precision, None
    pairs = (item.partition("=") for item in listed.split(",") if item)
    booleans = {"True": True, "False": False}
    return precision, QuantizationOptions(**{k: booleans.get(v, v) for k, _, v in pairs})  # type: ignore[arg-type]


def fp8_dtype(arch: str) -> torch.dtype:
    """The FP8 format of an architecture's matrix units: e4m3fnuz on MI300 (gfx94x), e4m3fn
    elsewhere.
    """
    return torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn


def p_exponent(precision: str, fp8: torch.dtype) -> int:
    """P = exp2(score - max) is multiplied by 2 to this power before it is rounded.

    The largest power of two that FP8 holds, so that small weights are far from its subnormals; 0
    for fp16.
    """
    return 0 if precision == "sage_fp16" else math.floor(math.log2(torch.finfo(fp8).max))


def v_limit(precision: str, pv_accumulation: str, fp8: torch.dtype) -> float:
    """What the largest value of a channel of V is scaled to; for fp16 the bound it stays below.

    In FP8 with fp16 sums: the largest code of which 64, times the largest P, stay within fp16.
    """
    if precision == "sage_fp16":
        return 512.0
    if pv_accumulation == "fp32":
        return torch.finfo(fp8).max
    bound = _FP16_MAX / (TILE * 2.0 ** p_exponent(precision, fp8))
    mantissa, exponent = math.frexp(bound)
    return math.ldexp(math.floor(mantissa * 16) / 16, exponent)  # e4m3: 1 + 3 binary digits


@dataclass(frozen=True)
class Tiling:
    """How ``length`` tokens in slots of ``slot`` tokens are cut into tiles of 64, afresh in every
    slot.

    With slots of a multiple of 64 tokens, and in dense attention, tile t is simply the tokens 64 t
    to 64 t + 63.
    """

    length: int
    slot: int

    @property
    def tiles_per_slot(self) -> int:
        return -(-self.slot // TILE)

    @property
    def num_tiles(self) -> int:
        whole, rest = divmod(self.length, self.slot)
        return whole * self.tiles_per_slot + -(-rest // TILE)

    def tile_and_row(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of every token: its tile, and its row within the tile; int64 [length]."""
        token = torch.arange(self.length, device=device)
        inside = token % self.slot
        return token // self.slot * self.tiles_per_slot + inside // TILE, inside % TILE

    def tokens(self, device: torch.device) -> Tensor:
        """Of every tile: its tokens, int64 [num_tiles, 64]; -1 where a tile is not full."""
        tile, row = self.tile_and_row(device)
        tokens = torch.full((self.num_tiles, TILE), -1, dtype=torch.int64, device=device)
        tokens[tile, row] = torch.arange(self.length, device=device)
        return tokens


def scale_groups(
    role: str, granularity: str, tiling: Tiling, device: torch.device
) -> tuple[Tensor, int]:
    """The scale group of every token, int64 [length], and how many there are.

    Args:
        role: "q" or "k".
    """
    tile, row = tiling.tile_and_row(device)
    if granularity == "per_head":
        return torch.zeros_like(tile), 1
    per_tile, in_tile = {
        ("q", "per_block"): (1, row * 0),
        ("q", "per_warp"): (4, row // 16),
        ("q", "per_thread"): (32, row // 16 * 8 + row % 8),
        ("k", "per_block"): (1, row * 0),
        ("k", "per_warp"): (1, row * 0),
        ("k", "per_thread"): (4, row % 8 // 2),
    }[role, granularity]
    return tile * per_tile + in_tile, tiling.num_tiles * per_tile


def scale_and_inverse(amax: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """``amax / limit`` and ``limit / amax``; both 0 for amax below 2^-100."""
    tiny = amax < _SMALLEST_AMAX
    scale = torch.where(tiny, 0.0, amax / limit)
    return scale, torch.where(tiny, 0.0, limit / amax.masked_fill(tiny, 1.0))


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``x`` (fp32, already scaled) to ``dtype``: nearest, ties to even, clamped; NaN becomes
    0.
    """
    x = x.nan_to_num(nan=0.0)
    if dtype == torch.int8:
        return x.round().clamp(-_INT8_LIMIT, _INT8_LIMIT).to(torch.int8)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def quantize_tokens(
    x: Tensor, group: Tensor, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize fp32 ``x`` [B, H, S, D] with one scale per group of tokens (``group`` int64 [S]).

    Returns:
        codes of ``dtype`` (int8 or FP8) [B, H, S, D], scales fp32 [B, H, groups].
    """
    limit = _INT8_LIMIT if dtype == torch.int8 else torch.finfo(dtype).max
    amax = torch.zeros(*x.shape[:2], groups, dtype=torch.float32, device=x.device)
    amax = amax.scatter_reduce(2, group.expand(x.shape[:3]), x.abs().amax(-1), "amax")
    scale, inverse = scale_and_inverse(amax, limit)
    return encode(x * inverse[..., group, None], dtype), scale


def quantize_channels(
    v: Tensor, precision: str, options: QuantizationOptions, fp8: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize fp32 ``v`` [B, H, S, D] with one scale per channel (per head for granularity
    "per_head").

    Returns:
        codes, fp16 or FP8, [B, H, S, D]; scales fp32 [B, H, D].
    """
    amax = v.abs().amax(2)
    if options.granularity == "per_head":
        amax = amax.amax(-1, keepdim=True).expand_as(amax)
    limit = v_limit(precision, options.pv_accumulation, fp8)
    if precision != "sage_fp16":
        scale, inverse = scale_and_inverse(amax, limit)
        return encode(v * inverse[:, :, None], fp8), scale
    _, exponent = torch.frexp(
        torch.where(amax.isfinite(), amax, 1.0)
    )  # amax = m 2^e, m in [1/2, 1)
    shift = exponent - int(math.log2(limit))
    scale, inverse = (
        torch.ldexp(torch.ones_like(amax), shift),
        torch.ldexp(torch.ones_like(amax), -shift),
    )
    scale = torch.where(amax.isfinite(), scale.masked_fill(amax < _SMALLEST_AMAX, 0.0), amax)
    inverse = inverse.masked_fill((amax < _SMALLEST_AMAX) | ~amax.isfinite(), 0.0)
    return encode(v * inverse[:, :, None], torch.float16), scale


def hadamard_rotation(x: Tensor) -> Tensor:
    """Rotate the last dimension of ``x`` by a normalised Hadamard matrix, in blocks of the largest
    power of two.
    """
    block = x.shape[-1] & -x.shape[-1]
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (x.unflatten(-1, (-1, block)) @ (matrix / math.sqrt(block))).flatten(-2)


class QuantizedInputs(NamedTuple):
    """Codes and scales of q, k, v, as attention reads them; see :func:`quantize_inputs`."""

    q: Tensor  # int8 or FP8 [B, Hq, Sq, D]
    k: Tensor  # int8 or FP8 [B, Hkv, Sk, D]
    v: Tensor  # fp16 or FP8 [B, Hkv, Sk, Dv]
    q_scale: Tensor  # fp32 [B, Hq, groups]
    k_scale: Tensor  # fp32 [B, Hkv, groups]
    v_scale: Tensor  # fp32 [B, Hkv, Dv]
    v_mean: Tensor | None  # fp32 [B, Hkv, Dv], smooth_v
    q_group: Tensor  # int64 [Sq]: the scale group of each token
    k_group: Tensor  # int64 [Sk]
    lse_shift: (
        Tensor | None
    )  # fp32 [B, Hq, Sq], smooth_k: scale * (q . mean of K), to add to the lse
    score_shift: (
        Tensor | None
    )  # fp32 [B, Hq, query tiles, Sk], smooth_q: to add to the base-2 scores


def quantize_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: str,
    options: QuantizationOptions | None = None,
    *,
    scale: float,
    q_tiling: Tiling | None = None,
    kv_tiling: Tiling | None = None,
    q_valid: Tensor | None = None,
    kv_valid: Tensor | None = None,
    fp8: torch.dtype = torch.float8_e4m3fn,
) -> QuantizedInputs:
    """Quantize q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] (fp16, bf16 or fp32); none
    of them changes.

    Args:
        precision: one of ``QUANTIZED_PRECISIONS``. options: default ``QuantizationOptions()``.
        scale: of the scores; only ``lse_shift`` and ``score_shift`` depend on it.
        q_tiling, kv_tiling: default one slot for the whole sequence, as in dense attention.
        q_valid [B|1, Sq], kv_valid [B|1, Sk]: bool, tokens that count; default all.
        fp8: float8_e4m3fn or float8_e4m3fnuz.

    Raises:
        ValueError: precision, options, head_dim and fp8 do not fit together.
    """
    options = QuantizationOptions() if options is None else options
    check_recipe(precision, options, q.shape[3])
    if fp8 not in FP8_DTYPES:
        raise ValueError(f"fp8 must be float8_e4m3fn or float8_e4m3fnuz, got {fp8}")
    q_tiling = q_tiling or Tiling(q.shape[2], max(1, q.shape[2]))
    kv_tiling = kv_tiling or Tiling(k.shape[2], max(1, k.shape[2]))
    if kv_valid is None:
        kv_valid = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
    q, k, v = (
        x.float() if valid is None else torch.where(valid[:, None, :, None], x.float(), 0.0)
        for x, valid in ((q, q_valid), (k, kv_valid), (v, kv_valid))
    )
    if options.hadamard:
        q, k = hadamard_rotation(q), hadamard_rotation(k)
    k_mean, k = _smooth(k, kv_valid) if options.smooth_k else (None, k)
    v_mean, v = _smooth(v, kv_valid) if options.smooth_v else (None, v)
    lse_shift = None
    if k_mean is not None:
        group = q.shape[1] // k.shape[1]
        lse_shift = scale * (q @ k_mean.repeat_interleave(group, 1)[..., None])[..., 0]
    score_shift = None
    if options.smooth_q:
        q, score_shift = _smooth_q(q, k, q_tiling, q_valid, scale)
    q_group, q_groups = scale_groups("q", options.granularity, q_tiling, q.device)
    k_group, k_groups = scale_groups("k", options.granularity, kv_tiling, k.device)
    qk_dtype = fp8 if precision == "fp8" else torch.int8
    q_codes, q_scale = quantize_tokens(q, q_group, q_groups, qk_dtype)
    k_codes, k_scale = quantize_tokens(k, k_group, k_groups, qk_dtype)
    v_codes, v_scale = quantize_channels(v, precision, options, fp8)
    return QuantizedInputs(
        q_codes, k_codes, v_codes, q_scale, k_scale, v_scale, v_mean, q_group, k_group, lse_shift,
    score_shift )  # fmt: skip


def _smooth(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over the valid tokens [B, H, D], x minus it; invalid tokens stay 0)."""
    count = valid.sum(-1).clamp(min=1)[:, None, None]
    mean = x.sum(2) / count
    return mean, torch.where(valid[:, None, :, None], x - mean[:, :, None], 0.0)


def _smooth_q(
    q: Tensor, k: Tensor, tiling: Tiling, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(q minus the mean of its tile, what that takes from the base-2 scores [B, Hq, tiles, Sk])."""
    tile, _ = tiling.tile_and_row(q.device)
    if valid is None:
        valid = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    counted = valid.float()
    sums = q.new_zeros(*q.shape[:2], tiling.num_tiles, q.shape[3]).index_add_(2, tile, q)
    counts = q.new_zeros(counted.shape[0], tiling.num_tiles).index_add_(1, tile, counted)
    mean = sums / counts.clamp(min=1)[:, None, :, None]
    smooth = torch.where(counted.bool()[:, None, :, None], q - mean[:, :, tile], 0.0)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return smooth, mean @ keys.mT * (scale * LOG2E)
