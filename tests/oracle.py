"""What attention must compute: masked softmax in fp64 from the definitions; and the tolerance rule.

Token masks are made here from token coordinates and sets, never from a BlockMask or a layout of the
package: the code under test cannot agree with itself. A token mask is bool [B|1, H|1, Sq, Sk], True
where a query sees a key.

The rule (FlashAttention's): the error of a kernel against fp64 may be at most twice the error of
plain torch in the kernel's dtype, plus a few roundings of the result; both as the largest and as
the root mean square error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Triple = tuple[int, int, int]
RULE_FACTOR = 2.0


class Result(NamedTuple):
    """What attention gives back; None for what was not computed."""

    out: Tensor
    lse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


class Question(Protocol):
    """What must be answered. All values are finite; a gradient that is None is not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    token_mask: Tensor
    scale: float | None
    grad_out: Tensor | None
    grad_lse: Tensor | None


@dataclass
class Case:
    """The simplest :class:`Question`, for tests that bring their own tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    token_mask: Tensor
    scale: float | None = None
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None


# -- token masks from the definitions --------------------------------------------------------------


def dense_tokens(q_len: int, kv_len: int) -> Tensor:
    """Every query sees every key."""
    return torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)


def causal_tokens(q_len: int, kv_len: int) -> Tensor:
    """Query i sees keys 0 .. i + kv_len - q_len: the last query sees every key."""
    rows = [[j <= i + kv_len - q_len for j in range(kv_len)] for i in range(q_len)]
    return torch.tensor(rows, dtype=torch.bool).view(1, 1, q_len, kv_len)


def listed_tokens(
    lists: Sequence[Sequence[Sequence[set[int]]]],
    block_sizes: tuple[int, int],
    lengths: tuple[int, int],
    q_block_lens: Sequence[Sequence[int]] | None = None,
    kv_block_lens: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """``lists[b][h][i]``: key blocks that query block i sees; lens: valid tokens ``[b][block]``.

    A leading list of one entry serves every batch (or head).
    """
    (q_size, kv_size), (q_len, kv_len) = block_sizes, lengths
    sizes = [len(x) for x in (lists, q_block_lens, kv_block_lens) if x is not None]
    batch, heads = max(sizes), len(lists[0])
    tokens = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i, seen in enumerate(lists[b % len(lists)][h]):
                q_end = q_size if q_block_lens is None else q_block_lens[b % len(q_block_lens)][i]
                for j in seen:
                    kv_end = (
                        kv_size
                        if kv_block_lens is None
                        else kv_block_lens[b % len(kv_block_lens)][j]
                    )
                    tokens[
                        b, h, i * q_size : i * q_size + q_end, j * kv_size : j * kv_size + kv_end
                    ] = True
    return tokens


def raster_coordinates(grid: Triple) -> list[Triple]:
    """The (t, h, w) of every token of a video, frames first, then rows, then columns."""
    return [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]


def tile_order_coordinates(grid: Triple, tile: Triple) -> list[Triple]:
    """The same tokens, tile after tile in raster order, and in raster order inside each tile."""

    def place(token: Triple) -> tuple[Triple, Triple]:
        return _tile_of(token, tile), token

    return sorted(raster_coordinates(grid), key=place)


def padded_coordinates(grid: Triple, tile: Triple) -> list[Triple | None]:
    """Tile order where every tile owns prod(tile) slots, its tokens first; None is padding."""
    volume = math.prod(tile)
    slots: list[Triple | None] = []
    previous: Triple | None = None
    for token in tile_order_coordinates(grid, tile):
        if previous is not None and _tile_of(token, tile) != previous:
            slots += [None] * (-len(slots) % volume)
        previous = _tile_of(token, tile)
        slots.append(token)
    return slots + [None] * (-len(slots) % volume)


def _tile_of(token: Triple, tile: Triple) -> Triple:
    return token[0] // tile[0], token[1] // tile[1], token[2] // tile[2]


def sliding_tile_tokens(
    coordinates: Sequence[Triple | None],
    grid: Triple,
    tile: Triple,
    windows: Sequence[Triple],
    text_length: int = 0,
    valid_text: int | None = None,
) -> Tensor:
    """Sliding tile attention over [video tokens at ``coordinates``, text], one window per head.

    On an axis of n tiles, a query in tile c sees the tiles [lo, lo + w), where
    lo = clamp(c - w//2, 0, n - w) and w is clipped to n. The first ``valid_text`` text tokens are
    seen by all and see everything; later ones neither see nor are seen.
    """
    valid_text = text_length if valid_text is None else valid_text
    video = torch.tensor([(-1, -1, -1) if c is None else c for c in coordinates]).view(-1, 3)
    real = video[:, 0] >= 0
    text = torch.arange(text_length) < valid_text
    heads = []
    for window in windows:
        near = real[:, None] & real[None, :]
        for axis in range(3):
            tiles = -(-grid[axis] // tile[axis])
            width = min(window[axis], tiles)
            at = video[:, axis] // tile[axis]
            low = (at - width // 2).clamp(0, tiles - width)
            near &= (at[None, :] >= low[:, None]) & (at[None, :] < low[:, None] + width)
        seen_by_video = torch.cat([near, real[:, None] & text[None, :]], 1)
        everything = torch.cat([real, text])
        seen_by_text = text[:, None] & everything[None, :]
        heads.append(torch.cat([seen_by_video, seen_by_text], 0))
    return torch.stack(heads)[None]


def selected_tile_tokens(
    q_tiles: Sequence[int],
    kv_tiles: Sequence[int],
    selected: Sequence[Sequence[Sequence[set[int]]]],
) -> Tensor:
    """Video sparse attention: a query sees the keys of the tiles selected for its own tile.

    ``q_tiles`` and ``kv_tiles`` give the tile number of every token, -1 for padding;
    ``selected[b][h][i]`` is the set of key tiles of query tile i.
    """
    count = 1 + max(
        [*kv_tiles, *(j for heads in selected for rows in heads for row in rows for j in row)]
    )
    q_tile, kv_tile = torch.tensor(q_tiles), torch.tensor(kv_tiles)
    table = torch.zeros(
        len(selected), len(selected[0]), len(selected[0][0]), count, dtype=torch.bool
    )
    for b, heads in enumerate(selected):
        for h, rows in enumerate(heads):
            for i, tiles in enumerate(rows):
                table[b, h, i, sorted(tiles)] = True
    tokens = table[:, :, q_tile.clamp_min(0)][..., kv_tile.clamp_min(0)]
    return tokens & (q_tile >= 0)[:, None] & (kv_tile >= 0)[None, :]


# -- the definition --------------------------------------------------------------------------------


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) in fp64, differentiable; a query that sees nothing gives 0 and -inf."""
    q, k, v, scale = _prepared(q.double(), k.double(), v.double(), scale)
    scores, sees = _masked_scores(q, k, token_mask.to(q.device), scale)
    weights = scores.softmax(-1).masked_fill(~sees, 0.0)
    return weights @ v, scores.logsumexp(-1).masked_fill(~sees.squeeze(-1), -torch.inf)


def attention_plain(
    q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same in the dtype of q as torch computes it: products in that dtype, softmax in fp32.

    Differentiable. Its backward pass starts from the stored out and lse, as every fused one does,
    torch's own too: where a gradient is a small difference, autograd through the softmax would
    round less, or not at all.
    """
    return _plain(q, k, v, token_mask, scale, q.dtype)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    scale: float | None,
    stored_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    q, k, v, scale = _prepared(q, k, v, scale)
    return _PlainAttention.apply(q, k, v, token_mask.to(q.device), scale, stored_dtype)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        token_mask: Tensor,
        scale: float,
        stored_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        scores, sees = _masked_scores(q, k, token_mask, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp().masked_fill(~sees, 0.0)
        out = _product(weights.to(q.dtype), v)
        ctx.save_for_backward(q, k, v, weights, out.to(stored_dtype))
        ctx.scale = scale
        return out, lse.masked_fill(~sees, -torch.inf).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, out = ctx.saved_tensors
        wide = weights.dtype
        delta = (grad_out.to(wide) * out.to(wide)).sum(-1) - grad_lse
        grad_weights = _product(grad_out, v.mT).to(wide)
        grad_scores = (weights * (grad_weights - delta[..., None]) * ctx.scale).to(q.dtype)
        dv = _product(weights.to(q.dtype).mT, grad_out)
        return _product(grad_scores, k), _product(grad_scores.mT, q), dv, None, None, None


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Key heads repeated for their group of query heads, and the scale."""
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), scale


def _masked_scores(q: Tensor, k: Tensor, token_mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(scores, -inf where masked; bool [..., Sq, 1]: does the query see anything)."""
    scores = _product(q * scale, k.mT)
    scores = scores.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    sees = token_mask.any(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    # A row that sees nothing gets finite scores, so that no NaN is ever differentiated.
    return scores.masked_fill(~token_mask, -torch.inf).masked_fill(~sees, 0.0), sees


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their dtype, accumulated in fp32; torch's 16-bit CPU product can be very slow."""
    if a.dtype.itemsize == 2:
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def answer(
    attention: Callable[..., tuple[Tensor, Tensor]],
    question: Question,
    dtype: torch.dtype | None = None,
) -> Result:
    """``attention(q, k, v, token_mask, scale)`` and its gradients in ``dtype`` (default: of q)."""
    dtype = question.q.dtype if dtype is None else dtype
    needs_grad = question.grad_out is not None or question.grad_lse is not None
    q, k, v = (
        x.detach().to(dtype).contiguous().requires_grad_(needs_grad)
        for x in (question.q, question.k, question.v)
    )
    out, lse = attention(q, k, v, question.token_mask, question.scale)
    if not needs_grad:
        return Result(out.detach(), lse.detach())
    outputs = [(out, question.grad_out), (lse, question.grad_lse)]
    used = [(y, g.to(y.dtype)) for y, g in outputs if g is not None]
    grads = torch.autograd.grad(
        [y for y, _ in used], (q, k, v), [g for _, g in used], allow_unused=True
    )
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip((q, k, v), grads, strict=True)]
    return Result(out.detach(), lse.detach(), *grads)


# -- the rule --------------------------------------------------------------------------------------


def expected_answers(question: Question) -> tuple[Result, list[Result]]:
    """The truth in fp64, and answers in the question's dtype whose errors are the measure.

    These are plain torch; the best that a fused kernel can do, which computes in fp64 but starts
    its backward pass from an out stored in the question's dtype; and for fp32, where errors are a
    matter of luck, plain torch with the sums in other orders.
    """
    dtype = question.q.dtype

    def stored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None):
        return _plain(q, k, v, mask, scale, dtype)

    plain = [answer(attention_plain, question), answer(stored, question, torch.float64)]
    if dtype == torch.float32:
        plain += [answer(_other_order(seed), question) for seed in range(2)]
    return answer(attention_oracle, question, torch.float64), plain


def _other_order(seed: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """:func:`attention_plain` with its keys, and the channels of the heads, in a random order."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None):
        generator = torch.Generator().manual_seed(seed)
        keys, channels, channels_v = (
            torch.randperm(n, generator=generator).to(q.device) for n in (*k.shape[2:], v.shape[3])
        )
        q, k, v = q[..., channels], k[:, :, keys][..., channels], v[:, :, keys][..., channels_v]
        out, lse = attention_plain(q, k, v, mask.to(q.device)[..., keys], scale)
        return out[..., channels_v.argsort()], lse

    return attention


def check_against_oracle(
    result: Result,
    question: Question,
    label: str = "",
    expected: tuple[Result, list[Result]] | None = None,
) -> None:
    """Raises AssertionError, with the numbers, unless all that ``result`` holds obeys the rule.

    Also: shapes and dtypes; nothing is NaN; out, dq of a query that sees nothing are exactly 0 and
    its lse -inf; dk, dv of a key that nobody sees are exactly 0. ``expected``: the
    :func:`expected_answers`, where a test has them already.
    """
    exact, plain = expected_answers(question) if expected is None else expected
    scores = _largest_score(question)
    _check_nothing_from_nothing(result, question, label)
    for name, got, *wanted in zip(Result._fields, result, exact, *plain, strict=True):
        if got is not None:
            assert wanted[0] is not None, f"{label} {name} has nothing to be compared with"
            check_close(f"{label} {name}".strip(), got, *wanted, lse=exact.lse, scores=scores)


def _largest_score(question: Question) -> float:
    """A bound of |scale q.k|, and so of the partial sums on the way to it."""
    if question.q.numel() == 0 or question.k.numel() == 0:
        return 0.0
    scale = 1 / math.sqrt(question.q.shape[-1]) if question.scale is None else question.scale
    q_norm, k_norm = (float(x.double().norm(dim=-1).amax()) for x in (question.q, question.k))
    return scale * q_norm * k_norm


def check_close(
    name: str,
    got: Tensor,
    exact: Tensor,
    *plain: Tensor,
    lse: Tensor | None = None,
    scores: float = 0.0,
) -> None:
    """The rule for one tensor: error of ``got`` <= 2 x (error of ``plain`` + rounding).

    Of several plain answers, the first of which has the right dtype, the worst counts.
    ``lse`` and ``scores`` (their largest size): of the softmax behind the tensor. Weights are made
    as exp(score - lse), and fp32 numbers of size 20 there give them a relative error of
    20 * 2**-24: that rounding is allowed even where torch was lucky.
    """
    assert got.shape == exact.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    )
    assert got.dtype == plain[0].dtype, f"{name}: dtype {got.dtype}, expected {plain[0].dtype}"
    assert not got.isnan().any(), (
        f"{name}: {int(got.isnan().sum())} of {got.numel()} values are NaN"
    )
    infinite = exact.isinf()
    same = torch.equal(got.isinf(), infinite) and torch.equal(
        got[infinite].double(), exact[infinite]
    )
    assert same, f"{name}: {int(got.isinf().sum())} infinite values, expected {int(infinite.sum())}"
    if got.numel() == 0:
        return
    exact = exact.masked_fill(infinite, 0.0)
    errors, *plain_errors = (
        (x.double().masked_fill(infinite, 0.0) - exact).abs() for x in (got, *plain)
    )
    if lse is not None and lse.isfinite().any():
        scores += float(lse[lse.isfinite()].abs().max())
    rounding = _rounding(exact, got.dtype) + exact.abs() * 2.0**-24 * scores
    for norm, measure in (("largest", torch.amax), ("rms", _root_mean_square)):
        error, allowance = float(measure(errors)), float(measure(rounding))
        plain_error = max(float(measure(x)) for x in plain_errors)
        allowed = RULE_FACTOR * (plain_error + allowance)
        if error > allowed:
            raise AssertionError(
                f"{name}: {norm} error {error:.3e} > allowed {allowed:.3e} = {RULE_FACTOR:g} x "
                f"(torch's error {plain_error:.3e} + rounding {allowance:.3e}); "
                f"{_worst(errors, got, exact)}"
            )


def _rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What adding and taking away 0.3 in ``dtype`` loses, per value: the atol, from the data."""
    if dtype == torch.float64:  # no wider type to compare with: another order of summation
        return 1e-13 * (1 + exact.abs().amax()).expand_as(exact)
    near = exact.to(dtype)
    return (near + 0.3 - 0.3 - near).double().abs()


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _worst(errors: Tensor, got: Tensor, exact: Tensor) -> str:
    at = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
    where = f"worst at {list(at)} of {list(got.shape)}"
    return f"{where}: got {float(got[at]):.6g}, exact {float(exact[at]):.6g}"


def _check_nothing_from_nothing(result: Result, question: Question, label: str) -> None:
    """Queries that see nothing, and keys that nobody sees, leave exact zeros (and lse -inf)."""
    q, k = question.q, question.k
    group = q.shape[1] // k.shape[1]
    tokens = question.token_mask.to(q.device).expand(q.shape[0], q.shape[1], -1, -1)
    blind = ~tokens.any(-1)
    unseen = ~tokens.any(-2).unflatten(1, (-1, group)).any(2)
    for name, rows, expected in (
        ("out", blind, 0.0),
        ("lse", blind, -torch.inf),
        ("dq", blind, 0.0),
        ("dk", unseen, 0.0),
        ("dv", unseen, 0.0),
    ):
        got = getattr(result, name)
        if got is not None:
            wrong = int((got[rows] != expected).sum())
            what = "queries that see no key" if rows is blind else "keys that no query sees"
            assert wrong == 0, (
                f"{label} {name}: {wrong} values of {what} are not {expected}".strip()
            )
