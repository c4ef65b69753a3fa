"""RMS norm and rotary positions of q and k, and the place of all tokens, in one pass.

Between the projections of a video transformer and its attention, each of q, k and v is read once
and written once, to where attention wants its tokens. One program owns a token: all heads of its
q, k and v, so that the norm over all of them needs no other program, and rotary tables are read
once for both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, padded

# Not ``sized_jit``: a row is one long vector, whose loads need to know that 16 divides the strides.
_jit = triton.jit(do_not_specialize=["n_tokens", "q_eps", "k_eps"])


@triton.jit
def _token(slots, n_tokens):
    """Batch, token and its place in the order that ``slots`` says, all 64-bit."""
    i = tl.program_id(0).to(tl.int64)
    i_b, i_s = i // n_tokens, i % n_tokens
    i_slot = i_s
    if slots is not None:
        i_slot = tl.load(slots + i_s).to(tl.int64)
    return i_b, i_s, i_slot


@triton.jit
def _pair_offsets(D: tl.constexpr, BC: tl.constexpr):
    """Where the first channel of each pair (i, i + D/2) of a head stands [BC/2]."""
    o = tl.arange(0, BC // 2)
    return o // (D // 2) * D + o % (D // 2)


@triton.jit
def _load_pairs(p_row, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr):
    """First and second of each pair of channels, fp32 [BC/2]; zero past C channels."""
    if SPLIT:
        o = _pair_offsets(D, BC)
        b_0 = tl.load(p_row + o, mask=o < C, other=0.0)
        b_1 = tl.load(p_row + o + D // 2, mask=o < C, other=0.0)
    else:
        o = tl.arange(0, BC)
        b_0, b_1 = tl.split(tl.reshape(tl.load(p_row + o, mask=o < C, other=0.0), [BC // 2, 2]))
    return b_0.to(tl.float32), b_1.to(tl.float32)


@triton.jit
def _load_table(
    p_row, stride_h, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr
):
    """The same of cos or sin, whose heads are ``stride_h`` apart; with SPLIT one for a pair."""
    if SPLIT:
        o = tl.arange(0, BC // 2)
        R: tl.constexpr = D // 2
        b_0 = tl.load(p_row + o // R * stride_h + o % R, mask=o < C // 2, other=0.0)
        b_1 = b_0
    else:
        o = tl.arange(0, BC)
        b_x = tl.load(p_row + o // D * stride_h + o % D, mask=o < C, other=0.0)
        b_0, b_1 = tl.split(tl.reshape(b_x, [BC // 2, 2]))
    return b_0.to(tl.float32), b_1.to(tl.float32)


@triton.jit
def _store_pairs(
    p_row, b_0, b_1, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr
):
    b_0, b_1 = b_0.to(p_row.dtype.element_ty), b_1.to(p_row.dtype.element_ty)
    if SPLIT:
        o = _pair_offsets(D, BC)
        tl.store(p_row + o, b_0, mask=o < C)
        tl.store(p_row + o + D // 2, b_1, mask=o < C)
    else:
        o = tl.arange(0, BC)
        tl.store(p_row + o, tl.reshape(tl.join(b_0, b_1), [BC]), mask=o < C)


@triton.jit
def _norm_rotate(
    p_out, b_0, b_1, weight, eps, cos_0, cos_1, sin_0, sin_1,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Writes x / sqrt(mean(x^2) + eps) * weight, each pair of it turned by its angle."""
    mean = (tl.sum(b_0 * b_0, 0) + tl.sum(b_1 * b_1, 0)) / C
    scale = 1.0 / tl.sqrt_rn(mean + eps)
    b_0, b_1 = b_0 * scale, b_1 * scale
    if weight is not None:
        w_0, w_1 = _load_pairs(weight, C, D, BC, SPLIT)
        b_0, b_1 = b_0 * w_0, b_1 * w_1
    y_0, y_1 = b_0 * cos_0 - b_1 * sin_0, b_1 * cos_1 + b_0 * sin_1
    _store_pairs(p_out, y_0, y_1, C, D, BC, SPLIT)


@_jit
def norm_rotate_kernel(
    q, k, v, q_out, k_out, v_out, q_weight, k_weight, cos, sin, slots,
    stride_q_b, stride_q_s, stride_k_b, stride_k_s, stride_v_b, stride_v_s, stride_out_b,
    stride_cos_b, stride_cos_s, stride_cos_h, stride_sin_b, stride_sin_s, stride_sin_h,
    n_tokens, q_eps, k_eps,
    C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """q_out, k_out, v_out [B, N, C] at ``slots`` (None: where they were) from q, k, v [B, S, C].

    cos and sin are [B, S, H, D], and the pairs of channels that turn together are neighbours; with
    SPLIT they are D/2 apart, and the tables are [B, S, H, D/2]. Rows of the outputs that are no
    token's are not written.
    """
    i_b, i_s, i_slot = _token(slots, n_tokens)
    o = tl.arange(0, BC)
    # All that is read, first: the more loads are under way, the better.
    b_v = tl.load(v + i_b * stride_v_b + i_s * stride_v_s + o, mask=o < C, other=0.0)
    q_0, q_1 = _load_pairs(q + i_b * stride_q_b + i_s * stride_q_s, C, D, BC, SPLIT)
    k_0, k_1 = _load_pairs(k + i_b * stride_k_b + i_s * stride_k_s, C, D, BC, SPLIT)
    p_cos = cos + i_b * stride_cos_b + i_s * stride_cos_s
    p_sin = sin + i_b * stride_sin_b + i_s * stride_sin_s
    cos_0, cos_1 = _load_table(p_cos, stride_cos_h, C, D, BC, SPLIT)
    sin_0, sin_1 = _load_table(p_sin, stride_sin_h, C, D, BC, SPLIT)
    row = i_b * stride_out_b + i_slot * C
    tl.store(v_out + row + o, b_v, mask=o < C)
    _norm_rotate(
        q_out + row, q_0, q_1, q_weight, q_eps, cos_0, cos_1, sin_0, sin_1, C, D, BC, SPLIT
    )
    _norm_rotate(
        k_out + row, k_0, k_1, k_weight, k_eps, cos_0, cos_1, sin_0, sin_1, C, D, BC, SPLIT
    )


@_jit
def take_tokens_kernel(
    x, out, slots, stride_x_b, stride_x_s, stride_out_b, stride_out_s, n_tokens,
    C: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [B, S, C] = x [B, N, C] at ``slots``."""
    i_b, i_s, i_in = _token(slots, n_tokens)
    o = tl.arange(0, BC)
    m = o < C
    b_x = tl.load(x + i_b * stride_x_b + i_in * stride_x_s + o, mask=m, other=0.0)
    tl.store(out + i_b * stride_out_b + i_s * stride_out_s + o, b_x, mask=m)


def norm_rotate(
    tensors: dict[str, Tensor | None], *, split: bool, q_eps: float, k_eps: float
) -> Launch:
    """The launch that fills q_out, k_out, v_out [B, N, H, D] (contiguous) from q, k, v [B, S, H, D]
    (heads and channels contiguous), weights [H * D] or None, cos and sin [B|1, S, H|1, D or D/2],
    slots [S] or None.
    """
    q, out = tensors["q"], tensors["q_out"]
    assert q is not None and out is not None
    batch, tokens, heads, head_dim = q.shape
    args: dict[str, object] = {**tensors, "stride_out_b": out.stride(0)}
    for name, axes in (("q", "bs"), ("k", "bs"), ("v", "bs"), ("cos", "bsh"), ("sin", "bsh")):
        args |= _strides(name, tensors[name], axes)
    args |= {"n_tokens": tokens, "q_eps": q_eps, "k_eps": k_eps, "SPLIT": split, "D": head_dim}
    return _launch(norm_rotate_kernel, batch * tokens, heads * head_dim, args)


def take_tokens(x: Tensor, out: Tensor, slots: Tensor) -> Launch:
    """The launch that fills ``out`` [B, S, H, D] with the tokens ``slots`` [S] of x [B, N, H, D];
    heads and channels are contiguous in both.
    """
    batch, tokens, heads, head_dim = out.shape
    args: dict[str, object] = {"x": x, "out": out, "slots": slots, "n_tokens": tokens}
    args |= _strides("x", x, "bs") | _strides("out", out, "bs")
    return _launch(take_tokens_kernel, batch * tokens, heads * head_dim, args)


def _strides(name: str, x: Tensor | None, axes: str) -> dict[str, object]:
    assert x is not None
    steps = {axis: x.stride(i) if x.shape[i] > 1 else 0 for i, axis in enumerate(axes)}
    return {f"stride_{name}_{axis}": step for axis, step in steps.items()}


def _launch(kernel: object, programs: int, channels: int, args: dict[str, object]) -> Launch:
    block = padded(channels)
    warps = min(16, max(1, block // 1024))
    args |= {"C": channels, "BC": block}
    return Launch(kernel, programs, args, {"num_warps": warps, "num_stages": 1})
