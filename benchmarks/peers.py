"""What the benchmarks of sparse patterns share: one problem, our kernels, their peers, one check.

The same tensors and the same mask go to everybody, in one run, in turn. The peers are torch's dense
attention (cuDNN and flash on an NVIDIA GPU) and FlexAttention with the same mask.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from video_attn import BlockMask, attention
from video_attn.calls import problem_of
from video_attn.registry import backends, select
from video_attn.tools.bench import Result, Timing, require_correct, time_interleaved

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative error against the fp32 reference: some roundings of each dtype.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BACKWARD_FACTOR = 2.5  # floating-point operations of backward over forward
OURS, FLEX = "video_attn", "FlexAttention, same mask"
DETERMINISTIC = f"{OURS}, deterministic"  # gradients; the forward pass is the same

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One problem: q, k, v [B, H, S, D] that want gradients, a mask (None: dense), and what
    describes them.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    mask: BlockMask | None
    problem: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.grad.device

    @property
    def dense_flops(self) -> float:
        """Of the forward pass if every query saw every key, padding included."""
        batch, heads, length, head_dim = self.grad.shape
        return 4.0 * batch * heads * head_dim * length * length

    @property
    def flops(self) -> float:
        """Of the forward pass over the pairs that the mask keeps."""
        if self.mask is None:
            return self.dense_flops
        batch, heads, _, head_dim = self.grad.shape
        return self.mask.flops(head_dim, batch=batch, heads=heads)


def make_case(mask: BlockMask, heads: int, head_dim: int, dtype: str, problem: dict) -> Case:
    """Normally distributed inputs for ``mask``, on its device."""
    dense = make_dense_case(mask.q_len, heads, head_dim, dtype, mask.device)
    return replace(dense, mask=mask, problem={**dense.problem, **problem})


def make_dense_case(
    tokens: int, heads: int, head_dim: int, dtype: str, device: torch.device | str
) -> Case:
    """Normally distributed inputs for dense attention."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, tokens, head_dim)
    q, k, v, grad = (
        torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(4)
    )
    described = {"dtype": dtype, "heads": heads, "tokens": tokens, "head_dim": head_dim}
    tensors = tuple(x.requires_grad_() for x in (q, k, v))
    return Case(tensors, grad, None, described)  # type: ignore[arg-type]


def backend_names(case: Case) -> tuple[str, str]:
    """The backends that run our forward and backward passes of ``case``."""
    problems = (problem_of(p, *case.tensors, case.mask) for p in ("forward", "backward"))
    forward, backward = (select(problem).name for problem in problems)
    return forward, backward


def providers(case: Case, with_flex: bool) -> dict[str, Run]:
    """Our kernels first, then the peers that this machine has.

    Ours are the backend that is chosen, and each other one that can serve.
    """
    runs: dict[str, Run] = {OURS: partial(_ours, case.mask)}
    for name in other_backends(case):
        runs[f"{OURS}, {name}"] = partial(_ours, case.mask, backend=name)
    if case.device.type == "cuda":
        runs[DETERMINISTIC] = partial(_ours, case.mask, deterministic=True)
    runs |= dense_peers(case.device)
    if with_flex and case.mask is not None:
        runs[FLEX] = partial(compiled_flex(), block_mask=case.mask.to_flex())
    return runs


def other_backends(case: Case) -> list[str]:
    """Backends that can serve both passes of ``case`` too, but are not the first choice."""
    problems = [problem_of(p, *case.tensors, case.mask) for p in ("forward", "backward")]
    able = [b.name for b in backends() if not any(b.refusal(problem) for problem in problems)]
    return [name for name in able if name not in ("reference", *backend_names(case))]


def dense_peers(device: torch.device) -> dict[str, Run]:
    """torch's dense attention, each fused implementation by itself."""
    if device.type == "cpu":
        return {"torch SDPA, dense": F.scaled_dot_product_attention}
    kinds = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {f"torch SDPA {name}, dense": partial(_sdpa, kind) for name, kind in kinds.items()}


def time_case(case: Case, runs: dict[str, Run], repeats: int, with_backward: bool) -> list[Result]:
    """Every provider forward and, where it has one, backward; checked first.

    Each of ours and FlexAttention is checked on the timed tensors against the fp32 reference, on
    the first and the last head.

    Raises:
        WrongResultError: a result is off; then nothing is timed.
    """
    graphs = {}
    if with_backward:
        graphs = {n: run(*case.tensors) for n, run in runs.items() if has_backward(n, case)}
    for name in runs:
        if name.startswith(OURS) or name == FLEX:
            _check(name, runs[name], graphs.get(name), case)
    quiet = tuple(x.detach() for x in case.tensors)
    forward = {name: run for name, run in runs.items() if name != DETERMINISTIC}
    calls = {"forward": {name: partial(run, *quiet) for name, run in forward.items()}}
    if graphs:
        calls["backward"] = {name: partial(_gradients, out, case) for name, out in graphs.items()}
    results = []
    for direction, peers in calls.items():
        timings = time_interleaved(peers, device=case.device, repeats=repeats)
        results += [result_of(case, direction, name, timings) for name in timings]
    return results


def time_host(mask: BlockMask, dtype: str, head_dim: int, repeats: int = 300) -> Timing:
    """What one forward call costs the host until it returns: kernels of one head are soon done."""
    one_head = replace(
        mask, kv_num_blocks=mask.kv_num_blocks[:, :1], kv_indices=mask.kv_indices[:, :1]
    )
    case = make_case(one_head, 1, head_dim, dtype, {})
    q, k, v = (x.detach() for x in case.tensors)
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        attention(q, k, v, one_head)
        samples.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return Timing(tuple(samples[repeats // 10 :]))


def has_backward(name: str, case: Case) -> bool:
    """FlexAttention has no backward pass on a CPU (and after an attempt stays uncompiled)."""
    return name != FLEX or case.device.type != "cpu"


def result_of(case: Case, direction: str, name: str, timings: dict[str, Timing]) -> Result:
    """Effective TFLOPS (real pairs only) and the speed-up over the fastest dense peer."""
    timing = timings[name]
    factor = 1.0 if direction == "forward" else BACKWARD_FACTOR
    dense = min(t.median for peer, t in timings.items() if peer.endswith("dense"))
    flops = case.dense_flops if name.endswith("dense") else case.flops
    metrics = {
        "tflops": factor * flops / timing.median / 1e12,
        "speed_up_over_dense": dense / timing.median,
    }
    return Result({**case.problem, "pass": direction}, name, timing, metrics)


def rows_of(results: list[Result]) -> list[tuple[object, ...]]:
    """Rows for a table with the columns pass, provider, time, TFLOPS, speed-up."""
    return [
        (
            r.problem["pass"],
            r.provider,
            r.timing,
            f"{r.metrics['tflops']:.3g}",
            f"{r.metrics['speed_up_over_dense']:.2f}x",
        )
        for r in results
    ]


COLUMNS = ("pass", "provider", "median (p20 to p80)", "effective TFLOPS", "over dense")


@cache
def compiled_flex() -> Callable[..., Tensor]:
    warnings.filterwarnings("ignore", message=".*dynamo.*")
    return torch.compile(flex_attention)


def _ours(
    mask: BlockMask | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor:
    return attention(q, k, v, mask, backend=backend, deterministic=deterministic)


def _sdpa(kind: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(q, k, v)


def _gradients(out: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, case.tensors, case.grad, retain_graph=True)


def _check(name: str, run: Run, graph: Tensor | None, case: Case) -> None:
    """The results of ``run`` against the reference in fp32, on the first and the last head."""
    limit = LIMITS[case.grad.dtype]
    got = [run(*(x.detach() for x in case.tensors))]
    if graph is not None:
        got += _gradients(graph, case)
    for head in {0, case.grad.shape[1] - 1}:
        expected = _reference(case, slice(head, head + 1), with_gradients=graph is not None)
        for part, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=False):
            require_correct(f"{name}, {part} of head {head}", x[:, head].detach(), y[:, 0], limit)


def _reference(case: Case, heads: slice, with_gradients: bool) -> list[Tensor]:
    mask = case.mask
    if mask is not None and mask.kv_indices.shape[1] > 1:
        counts, indices = mask.kv_num_blocks[:, heads], mask.kv_indices[:, heads]
        mask = replace(mask, kv_num_blocks=counts, kv_indices=indices, _transpose=None)
    exact = [x[:, heads].detach().float().requires_grad_(with_gradients) for x in case.tensors]
    out = attention(*exact, mask, backend="reference")
    if not with_gradients:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, exact, case.grad[:, heads].float())]
