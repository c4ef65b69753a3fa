"""AttentionCall: what a module asked of attention."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .fused_norms import Deferred


@dataclass(eq=False)
class AttentionCall:
    """What a module asked of attention: made from the arguments of torch's own; what that does not
    know is set afterwards.

    Attributes:
        query, key, value: [B, H, S, D], as views of what the module passed; under autocast they
            have its dtype, as torch's attention would give them.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as in
            ``torch.nn.functional.scaled_dot_product_attention``.
        backend, parallel_config: what diffusers' dispatcher was told, else None.
        gate: what the module's ``to_gate_compress`` made of this call, [B, H, tokens, D], else
            None.
        dispatched: whether diffusers' dispatcher was called, and not torch.
        deferred: what is still to be done to query and key, where that was put off (see
            :mod:`.fused_norms`), else None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    _: KW_ONLY
    scale: float | None = None
    enable_gqa: bool = False
    gate: Tensor | None = field(default=None, init=False)
    dispatched: bool = field(default=False, init=False)
    backend: Any = field(default=None, init=False)
    parallel_config: Any = field(default=None, init=False)
    deferred: Deferred | None = field(default=None, init=False)

    def dense(self) -> Tensor:
        """What the module meant, [B, H, S, Dv]: with its mask and its own backend."""
        options: dict[str, Any] = {
            "attn_mask": self.attn_mask,
            "dropout_p": self.dropout_p,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
        }
        if not self.dispatched:
            return F.scaled_dot_product_attention(self.query, self.key, self.value, **options)
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out = dispatch_attention_fn(
            self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2),
            backend=self.backend, parallel_config=self.parallel_config, **options,
        )  # fmt: skip
        return out.transpose(1, 2)

    def refuse_more(self, *, attn_mask: bool = True) -> None:
        """Raises ValueError where the call asks for more than attention over keys: that is never
        ignored. ``attn_mask=False`` allows a mask, whose meaning the caller knows.
        """
        for name, asked in (
            ("attn_mask", attn_mask and self.attn_mask is not None),
            ("dropout_p", self.dropout_p != 0.0),
            ("is_causal", self.is_causal),
            (
                "heads that differ without enable_gqa",
                not self.enable_gqa and self.query.shape[1] != self.key.shape[1],
            ),
        ):
            if asked:
                raise ValueError(f"block-sparse attention cannot serve a call with {name}")
