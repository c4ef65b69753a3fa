"""What a sparsified module knows of itself: its attributes, its switches, and what it has done."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import wants_gradient
from ..integrations.attention_call import AttentionCall
from ..integrations.intercept import ReplacedProcessor
from ..integrations.layer import LayerAttention
from ..layout import Triple
from .attributes import AttentionAttributes
from .config import merged, resolved
from .methods import options_of, pattern_of


class ModuleState:
    """The sparse attention of one module. Never part of ``state_dict``.

    Attributes:
        name: dotted name of the module in the model.
        given: the keys that the configuration gave, merged; :attr:`attributes` follow from them.
        attributes: None where no method was asked for.
        enabled: the switch of ``enable_`` and ``disable_sparse_attention``.
        video_shape: set at run time, before the one of the configuration; None: not set.
        other_role: what the module is where it is known not to be video self-attention ("text
            cross-attention"), so that it stays dense; None otherwise.
        index: its number among the video self-attention modules of its model.
        owner: the transformer (or model) whose calls say how the video lies; ``family``: whether it
            is one that we know.
        gate_owner: the module whose ``to_gate_compress`` is the gate; None: there is no gate.
        sparse_calls, dense_calls: calls until now, the dense ones by reason.
    """

    def __init__(
        self, name: str, given: Mapping[str, Any], attributes: AttentionAttributes | None
    ) -> None:
        self.name = name
        self.given = dict(given)
        self._take(attributes)
        self.enabled = attributes is not None and attributes.enable
        self.video_shape: Triple | None = None
        self.other_role: str | None = None
        self.index = 0
        self.owner: nn.Module | None = None
        self.family = False
        self.gate_owner: nn.Module | None = None
        self.added_gate = False
        self.reset()
        self._transient()

    def _take(self, attributes: AttentionAttributes | None) -> None:
        self.attributes = attributes
        self.pattern = None if attributes is None else pattern_of(attributes)
        self.options = {} if attributes is None else options_of(attributes)

    def reset(self) -> None:
        """Forgets calls and statistics."""
        self.sparse_calls = 0
        self.dense_calls: Counter[str] = Counter()
        self.last_grid: Triple | None = None
        self.totals: Tensor | None = None  # [calls, sum of densities], on the device

    def _transient(self) -> None:
        """What is never copied: a lock, and what compiled code knows this module by."""
        self._lock = threading.Lock()
        self._operator = LayerAttention(self._serve, 0)

    def _serve(self, index: int, call: AttentionCall) -> Tensor:
        from .attend import attend

        return attend(self, call)

    def answer(self, call: AttentionCall) -> Tensor:
        """Answers a call of attention of this module: [B, H, S, Dv].

        Compiled code calls it through one operator, which looks up what the call is about when it
        runs. An operator has no gradient; in training the attention itself is traced.
        """
        trained = wants_gradient(call.query, call.key, call.value)
        if trained and torch.compiler.is_compiling():
            return self._serve(0, call)
        return self._operator(call)

    def bind(self, processor: ReplacedProcessor) -> None:
        """Says through which processor of diffusers the calls come."""
        self._operator.processor = processor

    def override(self, given: Mapping[str, Any]) -> None:
        """Overrides the keys that ``given`` gives. Raises ValueError before anything changes."""
        new = merged(self.given, given)
        attributes = resolved(new)
        self.given = new
        self._take(attributes)
        if "enable" in given or "method" in given:
            self.enabled = attributes is not None and attributes.enable
        if "video_shape" in given:
            self.video_shape = None

    def shape_said(self) -> Triple | None:
        """The video shape that somebody set, at run time or in the configuration."""
        if self.video_shape is not None:
            return self.video_shape
        return None if self.attributes is None else self.attributes.video_shape

    def count_sparse(self, grid: Triple) -> None:
        """Notes a sparse call; not where torch.compile traces it, in training."""
        if torch.compiler.is_compiling():
            return
        with self._lock:
            self.sparse_calls += 1
            self.last_grid = grid

    def count_dense(self, reason: str) -> bool:
        """Notes a dense call; True the first time for this reason."""
        if torch.compiler.is_compiling():  # decided while tracing, and not counted in the graph
            return False
        with self._lock:
            self.dense_calls[reason] += 1
            return self.dense_calls[reason] == 1

    def add_density(self, density: Tensor) -> None:
        """Notes the density of a call, a scalar on the device; nothing is read back."""
        if torch.compiler.is_compiling():
            return
        now = torch.stack([torch.ones_like(density), density])
        with self._lock:
            self.totals = now if self.totals is None else self.totals + now

    def mean_density(self) -> float | None:
        """Kept token pairs over all pairs, the mean of all calls; None without statistics."""
        if self.totals is None:
            return None
        calls, density = self.totals.tolist()
        return density / calls

    def stats(self) -> dict[str, Any]:
        """See :meth:`SparseAttentionModule.get_stats`."""
        if self.attributes is None or not self.attributes.collect_stats:
            return {}
        calls = 0 if self.totals is None else int(self.totals[0])
        density = self.mean_density()
        return {
            "module": self.name,
            "method": self.attributes.method,
            "total_calls": calls,
            "average_sparsity": 0.0 if density is None else 1.0 - density,
            "dense_calls": dict(self.dense_calls),
            "video_shape": self.last_grid,
        }

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_lock", "_operator")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._transient()
