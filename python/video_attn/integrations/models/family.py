"""What is to be known of a family of models. Each file beside this one fills it in for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...functional.video_tokens import VideoTokens
from ...patterns.radial import RadialRule


class AttentionLayer(NamedTuple):
    """One self-attention over the video.

    ``name`` is that of the module in the transformer; ``layer`` is the number by which schedules
    speak of it.
    """

    name: str
    module: Any
    layer: int


@dataclass(frozen=True)
class Family:
    """A family of video transformers of diffusers.

    Attributes:
        name: of the family. transformers: the classes, by name.
        arguments: the first parameters of their ``forward``, in order; with their names everything
            of a call is found, whether it came by position or by name.
        attention_layers: the self-attentions over the video, in the order in which they run.
        tokens: (transformer, arguments of a call by name) -> how the tokens of this call lie.
        rule: the radial rule that was published for it, or the nearest.
        temporal_compression: frames of the video per latent frame of its VAE.
        temporal_patch: configuration -> latent frames per frame of tokens.
        masks_text: the ``attn_mask`` of its self-attention says nothing but which text is padding,
            which ``tokens`` says as well.
        large_mask: it makes such a mask of S x S for every layer, which is left out.
        gathers_text: it drops padded text itself, one batch item at a time, so that each call of
            attention holds the valid text of one item alone.
        rotary: class of a processor of diffusers that takes an RMS norm over all heads of q and k
            and then rotates them -> its parameter with the rotary positions, as (cos, sin).
    """

    name: str
    transformers: tuple[str, ...]
    arguments: tuple[str, ...]
    attention_layers: Callable[[Any], list[AttentionLayer]]
    tokens: Callable[[Any, dict[str, Any]], VideoTokens]
    rule: RadialRule
    temporal_compression: int = 4
    temporal_patch: Callable[[Any], int] = lambda config: 1
    masks_text: bool = False
    large_mask: bool = False
    gathers_text: bool = False
    rotary: Mapping[str, str] = field(default_factory=dict)

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of ``forward`` by name, whatever wraps that function.

        Raises:
            ValueError: one that this family needs is missing.
        """
        inputs = dict(zip(self.arguments, args, strict=False)) | kwargs
        for name in ("hidden_states", "timestep"):
            if name not in inputs:
                raise ValueError(f"the transformer of {self.name} was called without {name}")
        return inputs


def numbered(transformer: Any, *places: tuple[str, str]) -> list[AttentionLayer]:
    """``transformer.LIST[i].ATTENTION`` for each (LIST, ATTENTION), numbered through."""
    found: list[AttentionLayer] = []
    for blocks, attention in places:
        for index, block in enumerate(getattr(transformer, blocks)):
            name = f"{blocks}.{index}.{attention}"
            found.append(AttentionLayer(name, getattr(block, attention), len(found)))
    return found
