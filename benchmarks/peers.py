"""Who computes attention in a benchmark: our backends, torch's kernels, FlexAttention, and the
wheels of other projects that this machine has.

The same tensors and the same mask go to everybody, in one run. A peer that is absent, refuses or
fails is a row with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from video_attn import attention
from video_attn.calls import problem_of
from video_attn.registry import Problem, backends, select

OURS, FLEX = "video_attn", "FlexAttention, same mask"
DETERMINISTIC = f"{OURS}, deterministic"  # gradients; the forward pass is the same

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


class CannotRunError(RuntimeError):
    """A peer cannot run a case; the message says why."""


@dataclass(frozen=True)
class Provider:
    """Somebody who computes attention.

    Args:
        name: as the tables show it.
        prepare: makes the call for a case, once; raises :class:`CannotRunError` (or anything else)
            where there is none.
        ours: a wrong result is an error of the benchmark, not a row.
        dense: computes every pair: measured beside sparse ones, not checked against their mask.
        backward: has gradients.
        limit: relative error allowed instead of that of the dtype.
    """

    name: str
    prepare: Callable[[Case], Run]
    ours: bool = False
    dense: bool = False
    forward: bool = True
    backward: bool = True
    limit: float | None = None


def backend_names(case: Case) -> tuple[str, str]:
    """The backends that run our forward and backward passes of ``case``."""
    forward, backward = (select(problem).name for problem in _problems(case))
    return forward, backward


def _problems(case: Case) -> list[Problem]:
    return [
        problem_of(direction, *case.tensors, case.mask, is_causal=case.is_causal)
        for direction in ("forward", "backward")
    ]


def other_backends(case: Case) -> list[str]:
    """Backends that can serve both passes of ``case`` too, but are not the first choice."""
    problems = _problems(case)
    able = [b.name for b in backends() if not any(b.refusal(problem) for problem in problems)]
    return [name for name in able if name not in ("reference", *backend_names(case))]


def our_providers(case: Case) -> list[Provider]:
    """The backend that is chosen, each other one that can serve, deterministic gradients."""
    found = [Provider(OURS, partial(_ours), ours=True)]
    for name in other_backends(case):
        found.append(ours_on(name))
    if case.device.type == "cuda":
        run = partial(_ours, deterministic=True)
        found.append(Provider(DETERMINISTIC, run, ours=True, forward=False))
    return found


def ours_on(backend: str) -> Provider:
    """One backend, whichever would be chosen."""
    return Provider(f"{OURS}, {backend}", partial(_ours, backend=backend), ours=True)


def _ours(case: Case, **options: Any) -> Run:
    return lambda q, k, v: attention(q, k, v, case.mask, is_causal=case.is_causal, **options)


def dense_peers(device: torch.device) -> list[Provider]:
    """torch's dense attention, each fused implementation by itself."""
    if device.type == "cpu":
        return [Provider("torch SDPA, dense", _plain_sdpa, dense=True)]
    kinds = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return [
        Provider(f"torch SDPA {name}, dense", partial(_sdpa, kind), dense=True)
        for name, kind in kinds.items()
    ]


def efficient_peer() -> Provider:
    """torch's fused kernel for fp32."""
    kind = SDPBackend.EFFICIENT_ATTENTION
    return Provider("torch SDPA efficient, dense", partial(_sdpa, kind), dense=True)


def _plain_sdpa(case: Case) -> Run:
    return partial(F.scaled_dot_product_attention, is_causal=case.is_causal)


def _sdpa(kind: SDPBackend, case: Case) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return _plain_sdpa(case)(q, k, v)

    return run


def flex_peer(device: torch.device) -> Provider:
    """FlexAttention on the same lists. On a CPU it has no backward pass."""

    def prepare(case: Case) -> Run:
        if case.mask is None:
            raise CannotRunError("there is no mask")
        return partial(compiled_flex(), block_mask=case.mask.to_flex())

    return Provider(FLEX, prepare, backward=device.type != "cpu")


def dense_flex_peer(device: torch.device) -> Provider:
    """FlexAttention over all pairs, or over the causal ones."""

    def prepare(case: Case) -> Run:
        length = case.grad.shape[2]
        mask = None
        if case.is_causal:
            mask = create_block_mask(_causal, None, None, length, length, device=case.device)
        return partial(compiled_flex(), block_mask=mask)

    return Provider("FlexAttention", prepare, backward=device.type != "cpu")


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@cache
def compiled_flex() -> Callable[..., Tensor]:
    warnings.filterwarnings("ignore", message=".*dynamo.*")
    return torch.compile(flex_attention)


def vsa_peers() -> list[Provider]:
    """Kernels of other projects for lists of 64-token blocks."""
    return [
        Provider("fastvideo-kernel", _fastvideo),
        Provider("FlashInfer cake", _cake, backward=False),
    ]


def _need(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise CannotRunError(f"not installed (pip install {package})")


def _fastvideo(case: Case) -> Run:
    _need("fastvideo_kernel", "fastvideo-kernel")
    from fastvideo_kernel.block_sparse_attn import block_sparse_attn

    mask = case.mask
    assert mask is not None
    sizes = torch.full((mask.num_kv_blocks,), mask.kv_block_size, device=case.device).int()
    keep = mask.to_dense().expand(1, case.grad.shape[1], -1, -1).contiguous()
    return lambda q, k, v: block_sparse_attn(q, k, v, keep, sizes)[0]


def _cake(case: Case) -> Run:
    """One head at a time is one head of FlashInfer's [heads, tokens, head_dim]; planned before."""
    _need("flashinfer", "flashinfer-python")
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    mask = case.mask
    assert mask is not None
    heads, head_dim = case.grad.shape[1], case.grad.shape[3]
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=case.device)
    wrapper = VariableBlockSparseAttentionWrapper(workspace, backend="cake")
    sizes = torch.full((heads, mask.num_kv_blocks), mask.kv_block_size, device=case.device).int()
    wrapper.plan(
        block_mask_map=mask.to_dense()[0].expand(heads, -1, -1).contiguous(), block_row_sz=sizes,
        block_col_sz=sizes, num_qo_heads=heads, num_kv_heads=heads, head_dim=head_dim,
        q_data_type=case.grad.dtype,
    )  # fmt: skip
    return lambda q, k, v: wrapper.run(q[0], k[0], v[0])[None]


def quantized_peers() -> list[Provider]:
    """INT8 attention of other projects, dense."""
    return [Provider("sageattention", _sage, backward=False, limit=0.05)]


def _sage(case: Case) -> Run:
    _need("sageattention", "sageattention")
    if case.mask is not None:
        raise CannotRunError("dense only")
    from sageattention import sageattn

    return lambda q, k, v: sageattn(q, k.clone(), v, tensor_layout="HND")  # it writes to k
