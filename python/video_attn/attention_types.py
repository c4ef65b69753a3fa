"""The attention implementations that people know by name, each as a precision and backends.

One table, :data:`ATTENTION_TYPES`, for every command and function that takes such a name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache

from . import backends as _backends  # noqa: F401  fills the registry
from .quantize import QuantizationOptions
from .registry import Problem, Verdict, forced_backend, logger
from .registry import backends as registered_backends

TORCH_SDPA = "torch"  # stands for torch.nn.functional.scaled_dot_product_attention
_PER_BLOCK = QuantizationOptions(granularity="per_block")


@dataclass(frozen=True)
class AttentionType:
    """A row of the table.

    Args:
        name: as people write it. summary: what it is, in a few words.
        precision: as in :func:`video_attn.attention`. quantization: its options, None for the
            defaults, or for "native".
        backends: in the order in which they are tried; ``TORCH_SDPA`` is torch's own attention.
    """

    name: str
    summary: str
    precision: str
    quantization: QuantizationOptions | None
    backends: tuple[str, ...]

    def problem(self, problem: Problem) -> Problem:
        """``problem`` in the precision of this type, with its options."""
        options = self.quantization
        if options is None and self.precision != "native":
            options = QuantizationOptions()
        return replace(problem, precision=self.precision, quantization=options)

    def why_not(self, problem: Problem) -> list[Verdict]:
        """Every backend of this type in its order, with the reason why it does not serve
        ``problem`` (whose precision does not matter: the type has its own).
        """
        rows = {backend.name: backend for backend in registered_backends()}
        verdicts: list[Verdict] = []
        for name in self.backends:
            reason = None
            if name != TORCH_SDPA:
                reason = rows[name].refusal(self.problem(problem))
            elif problem.is_sparse:
                reason = "torch's attention is dense: it takes no BlockMask"
            chosen = reason is None and not any(verdict.chosen for verdict in verdicts)
            verdicts.append(Verdict(name, reason, chosen))
        return verdicts

    def choose(self, problem: Problem) -> str:
        """The first backend of the order that can serve ``problem``.

        ``use_backend`` and ``VIDEO_ATTN_BACKEND`` have more authority, as everywhere.

        Raises:
            RuntimeError: none can; the message says why for each.
        """
        forced = None if self.backends == (TORCH_SDPA,) else forced_backend()
        return _first(self, problem) if forced is None else forced[0]


@lru_cache(maxsize=1024)
def _first(row: AttentionType, problem: Problem) -> str:
    verdicts = row.why_not(problem)
    reasons = "\n".join(f"  {v.backend}: {v.reason}" for v in verdicts if v.reason is not None)
    for verdict in verdicts:
        if verdict.chosen:
            if reasons:
                level = logging.WARNING if verdict.backend == "reference" else logging.INFO
                logger.log(level, "%s runs on %s, because:\n%s", row.name, verdict.backend, reasons)
            return verdict.backend
    raise RuntimeError(f"no backend of attention type {row.name!r} can serve:\n{reasons}")


# "cpu" serves CPU tensors and nothing else. It comes before "triton" because that, where its
# interpreter is switched on, would serve them too, a thousand times slower.
_ROWS = (
    AttentionType("sdpa", "torch's scaled_dot_product_attention", "native", None, (TORCH_SDPA,)),
    AttentionType(
        "sagev1", "SageAttention: INT8 scores per block, fp16 values", "sage_fp16", _PER_BLOCK,
        ("cuda_sage", "cpu", "triton", "reference"),
    ),
    AttentionType(
        "fav2", "FlashAttention 2 in Triton", "native", None, ("cpu", "triton", "reference")
    ),
    AttentionType(
        "fav3", "FlashAttention 3: made for Hopper, elsewhere Triton", "native", None,
        ("hopper", "cpu", "triton", "reference"),
    ),
    AttentionType(
        "fav3_fp8", "FlashAttention 3 in FP8", "fp8", None,
        ("cuda_sage", "cpu", "triton", "reference"),
    ),
    AttentionType(
        "fav3_sage", "SageAttention as FlashAttention 3: INT8 scores per block, FP8 values",
        "sage_fp8", _PER_BLOCK, ("cuda_sage", "cpu", "triton", "reference"),
    ),
)  # fmt: skip
ATTENTION_TYPES = {row.name: row for row in _ROWS}


def resolve_attention_type(name: str) -> AttentionType:
    """The row of the table for one of its names.

    Raises:
        TypeError: the name is not a string. ValueError: there is no such name; the message lists
            all.
    """
    if not isinstance(name, str):
        raise TypeError(f"attention_type must be a string, got {name!r}")
    if name not in ATTENTION_TYPES:
        raise ValueError(
            f"attention_type must be one of {', '.join(ATTENTION_TYPES)}; got {name!r}"
        )
    return ATTENTION_TYPES[name]
