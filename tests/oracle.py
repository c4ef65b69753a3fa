"""What attention must compute: masked softmax in fp64 from the definitions; and the tolerance rule.

What a query sees is a token mask, bool [B|1, H|1, Sq, Sk], made in ``token_masks.py`` from the
definitions and never from a BlockMask or a layout of the package: the code under test cannot agree
with itself.

The rule (FlashAttention's): the error of a kernel against fp64 may be at most twice the error of
plain torch in the kernel's dtype, plus a few roundings of the result; both as the largest and as
the root mean square error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

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
