"""diffusers' own switch: ``transformer.set_attention_backend("video_attn")``, on request.

diffusers chooses its attention by a closed list of names. :func:`register_with_diffusers` adds
ours to it and :func:`unregister` takes them out again.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from .attention_call import AttentionCall
from .context_parallel import attend_in_parallel

# The name of a backend in diffusers, and the precision that it stands for.
BACKENDS = {
    "video_attn": "native",
    "video_attn_sage_fp16": "sage_fp16",
    "video_attn_sage_fp8": "sage_fp8",
    "video_attn_fp8": "fp8",
}
_logger = logging.getLogger(__name__)
_before: dict[str, Any] = {}


def register_with_diffusers() -> None:
    """Adds the names of ``BACKENDS`` to the attention backends of diffusers; once is enough.

    ``model.set_attention_backend(name)`` then gives all attention of the model that goes through
    diffusers' dispatcher to :func:`video_attn.attention`, dense. Calls with a mask or dropout stay
    torch's; that is logged once. Unlike diffusers' own names, ours do not become the active backend
    of other models on the way.
    """
    from diffusers.models import attention_dispatch as dispatch

    if _before:
        return
    registry: Any = dispatch._AttentionBackendRegistry
    _before["active"] = registry._active_backend
    _before["set_active_backend"] = registry.__dict__["set_active_backend"]
    for value, precision in BACKENDS.items():
        member = _add_member(dispatch.AttentionBackendName, value)
        function = functools.wraps(_attention)(functools.partial(_attention, precision))
        registry._backends[member] = function
        registry._constraints[member] = []
        registry._supported_arg_names[member] = set(_ARGUMENTS)
        registry._supports_context_parallel.add(value)
    registry.set_active_backend = classmethod(_set_active_backend)


def unregister() -> None:
    """Takes the names out again; a model that uses one of them must be reset before.

    Nothing stays behind: diffusers' active backend, if it was one of ours, is the one from before.
    """
    from diffusers.models import attention_dispatch as dispatch

    if not _before:
        return
    registry: Any = dispatch._AttentionBackendRegistry
    registry.set_active_backend = _before["set_active_backend"]
    if getattr(registry._active_backend, "value", None) in BACKENDS:
        registry._active_backend = _before["active"]
    for value in BACKENDS:
        member = dispatch.AttentionBackendName(value)
        for table in (registry._backends, registry._constraints, registry._supported_arg_names):
            table.pop(member, None)
        registry._supports_context_parallel.discard(value)
        _remove_member(dispatch.AttentionBackendName, member)
    _before.clear()


_ARGUMENTS = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
    "_parallel_config",
)  # fmt: skip


def _attention(
    precision: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *arguments: Any,
    _parallel_config: Any = None,
    **keywords: Any,
) -> Tensor:
    """[B, S, H, D], as diffusers has it; ``arguments`` and ``keywords`` as torch's attention."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    call = AttentionCall(q, k, v, *arguments, **keywords)
    call.parallel_config = _parallel_config
    if call.attn_mask is not None or call.dropout_p:
        if not torch.compiler.is_compiling():
            _say_once(f"attention with {'a mask' if call.attn_mask is not None else 'dropout'}")
        return call.dense().transpose(1, 2)
    if call.parallel_config is not None:
        return attend_in_parallel(call, None, None, precision=precision).transpose(1, 2)
    return attention(
        query, key, value, precision=precision, is_causal=call.is_causal, scale=call.scale,
        layout="bshd",
    )  # fmt: skip


@functools.cache
def _say_once(what: str) -> None:
    _logger.warning("%s stays torch's: video_attn's backends serve it no further", what)


def _set_active_backend(cls: Any, backend: Any) -> None:
    """diffusers' own function also makes the backend of one model that of all others: not ours."""
    leak = sys._getframe(1).f_code.co_name == "set_attention_backend"
    if leak and getattr(backend, "value", backend) in BACKENDS:
        return
    cls._active_backend = backend


def _add_member(names: Any, value: str) -> Any:
    member = str.__new__(names, value)
    member._name_, member._value_ = value.upper(), value
    names._member_map_[member._name_] = member
    names._member_names_.append(member._name_)
    names._value2member_map_[value] = member
    return member


def _remove_member(names: Any, member: Any) -> None:
    del names._member_map_[member._name_]
    names._member_names_.remove(member._name_)
    del names._value2member_map_[member._value_]
