"""Schedule: which layers and which denoising steps stay dense, and what else single layers do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..patterns.radial import RadialRule

Choice = RadialRule | Literal["dense"]


@dataclass(frozen=True)
class Schedule:
    """Where sparse attention applies: everywhere but in the dense layers and steps.

    The first layers and the first steps decide the composition of a video and suffer most from
    sparsity; keeping the last steps dense too helps against noise at the edges.

    Args:
        dense_layers: this many first layers stay dense.
        dense_first_steps, dense_last_steps: so many denoising steps stay dense, in all layers.
        overrides: what single layers or heads do instead in sparse steps: ``{layer: choice}`` or
            ``{(layer, head): choice}``, a choice being "dense" or a RadialRule. A head's goes
            before its layer's, and a layer's before ``dense_layers``.

    Raises:
        TypeError, ValueError: a count that is no int >= 0, or an override that is none of these.
    """

    dense_layers: int = 0
    dense_first_steps: int = 0
    dense_last_steps: int = 0
    overrides: Mapping[int | tuple[int, int], Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dense_layers", "dense_first_steps", "dense_last_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides must be a mapping, got {self.overrides!r}")
        object.__setattr__(self, "overrides", dict(self.overrides))
        for key, choice in self.overrides.items():
            if not (
                _is_index(key)
                or (isinstance(key, tuple) and len(key) == 2 and all(map(_is_index, key)))
            ):
                raise TypeError(f"overrides: a key must be layer or (layer, head), got {key!r}")
            check_choice(f"overrides[{key!r}]", choice)

    def check(self, layers: int, heads: int) -> None:
        """Raises ValueError where the schedule names a layer or head that the model lacks."""
        if self.dense_layers > layers:
            raise ValueError(f"dense_layers must be at most {layers}, got {self.dense_layers}")
        for key in self.overrides:
            layer, head = key if isinstance(key, tuple) else (key, 0)
            if layer >= layers or head >= heads:
                raise ValueError(
                    f"overrides: {key!r} is not in a model of {layers} layers with {heads} heads"
                )

    @property
    def needs_step(self) -> bool:
        """Whether the index of the denoising step makes a difference."""
        return self.dense_first_steps > 0 or self.dense_last_steps > 0

    def is_dense_step(self, step: int, steps: int) -> bool:
        """Whether step ``step`` of ``steps`` (counted from 0) is dense in all layers."""
        return step < self.dense_first_steps or step >= steps - self.dense_last_steps

    def choices(self, layer: int, heads: int, rule: Choice) -> list[Choice]:
        """What each head of a layer does in a sparse step; ``rule``: where nothing else is said."""
        default = "dense" if layer < self.dense_layers else rule
        default = self.overrides.get(layer, default)
        return [self.overrides.get((layer, head), default) for head in range(heads)]


def check_choice(name: str, choice: object) -> None:
    """Raises TypeError unless ``choice`` is "dense" or a RadialRule."""
    if choice != "dense" and not isinstance(choice, RadialRule):
        raise TypeError(f"{name} must be 'dense' or a RadialRule, got {choice!r}")


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
