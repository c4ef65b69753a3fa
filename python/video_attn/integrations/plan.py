"""MaskPlan: which block mask each layer of a model gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..block_mask import BlockMask
from ..layout import VideoLayout
from ..patterns.radial import radial_mask
from ..patterns.scene import Scenes
from .schedule import Choice, Schedule, check_choice


@dataclass(frozen=True)
class MaskPlan:
    """The masks of all layers for one size of video.

    Args:
        layout: the sequence of the model.
        rule: of all layers that the schedule does not treat otherwise.
        block_size: tokens of a mask block. scenes: which scenes may see each other, or None.
        schedule: dense layers and overrides. layers, heads: of the model.

    Raises:
        TypeError, ValueError: values that do not fit together, or not the model.
    """

    layout: VideoLayout
    rule: Choice
    block_size: int
    scenes: Scenes | None
    schedule: Schedule
    layers: int
    heads: int

    def __post_init__(self) -> None:
        check_choice("rule", self.rule)
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {self.schedule!r}")
        self.schedule.check(self.layers, self.heads)
        self.layer_masks(
            "cpu"
        )  # a rule or scenes that do not fit raise here, not at the first step

    def layer_masks(self, device: torch.device | str) -> list[BlockMask | None]:
        """The mask of each layer in a sparse step; None is dense. Equal layers share one mask."""
        masks: dict[tuple[Choice, ...], BlockMask | None] = {}
        of_layer = []
        for layer in range(self.layers):
            choices = tuple(self.schedule.choices(layer, self.heads, self.rule))
            if choices not in masks:
                masks[choices] = self._mask(choices, device)
            of_layer.append(masks[choices])
        return of_layer

    def density(self) -> float:
        """Token pairs that a sparse step computes over all pairs, the mean of all layers."""
        masks = self.layer_masks("cpu")
        known = {id(mask): mask.density() for mask in masks if mask is not None}
        return sum(1.0 if mask is None else known[id(mask)] for mask in masks) / len(masks)

    def _mask(self, choices: tuple[Choice, ...], device: torch.device | str) -> BlockMask | None:
        """One mask for the heads of a layer: none, one that all share, or one list per head."""
        different = {choice: self._choice_mask(choice, device) for choice in dict.fromkeys(choices)}
        if len(different) == 1:
            return different[choices[0]]
        some = next(mask for mask in different.values() if mask is not None)
        full = torch.ones_like(some.to_dense())
        heads = [
            full if mask is None else mask.to_dense()
            for mask in (different[choice] for choice in choices)
        ]
        length = self.layout.sequence_length
        return BlockMask.from_dense(
            torch.cat(heads, 1), self.block_size, self.block_size, q_len=length, kv_len=length
        ).compact()

    def _choice_mask(self, choice: Choice, device: torch.device | str) -> BlockMask | None:
        if choice == "dense":
            return None
        return radial_mask(
            self.layout, choice, block_size=self.block_size, scenes=self.scenes, device=device
        )
