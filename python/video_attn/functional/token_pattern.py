"""TokenPattern: what every pattern object answers."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from .video_tokens import VideoTokens
from .vsa import Gate

QKV = tuple[Tensor, Tensor, Tensor]
Options = dict[str, Any]
Self = TypeVar("Self", bound="TokenPattern")  # typing's own comes with Python 3.11


class TokenPattern:
    """A way to attend over the tokens of a video, for any model, layer and size.

    Pattern objects are immutable and hashable. Each says how it attends in ``_attend``, and how
    much it computes in ``density``; one that knows its query heads says so in ``check_heads`` and
    ``of_heads``.
    """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: VideoTokens,
        *,
        gate: Gate = None,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention over the tokens of one call. Differentiable.

        Args:
            query: [B, Hq, S, D]. key: [B, Hkv, S, D].
                value: [B, Hkv, S, Dv]. Any strides with unit last stride.
            tokens: how they lie.
            gate: the weight of a coarse branch that the model has learned: a number, or a tensor
                that broadcasts to [B, Hq, S, Dv]; the video tokens alone will do. It is for
                patterns that have such a branch, and plays no part in the others.
            scale, options: ``scale``, ``precision``, ``backend``, ``deterministic`` and
                ``quantization`` as in :func:`video_attn.attention`. A group of heads with a
                precision of its own keeps it.

        Returns:
            [B, Hq, S, Dv] in the dtype of query.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
            RuntimeError: no backend can serve; the message says why for each.
        """
        tokens.check(query, key)
        self.check_heads(query.shape[1])
        return self._attend((query, key, value), tokens, gate, {"scale": scale, **options})

    def _attend(self, qkv: QKV, tokens: VideoTokens, gate: Gate, options: Options) -> Tensor:
        """:meth:`attend` after its checks; ``qkv`` are (query, key, value)."""
        raise NotImplementedError

    def density(self, tokens: VideoTokens, heads: int = 1) -> float:
        """Pairs of tokens that are computed, over all pairs; the mean of the heads."""
        raise NotImplementedError

    def check_heads(self, heads: int) -> None:
        """Raises ValueError where the pattern is for another number of query heads."""

    def of_heads(self: Self, start: int, stop: int) -> Self:
        """The pattern of the query heads from ``start`` to before ``stop``."""
        return self
