"""The video transformers that :func:`video_attn.integrations.apply` knows, one file per family.

A new model is a file with a :class:`Family` and a line here.
"""

from __future__ import annotations

from typing import Any

from . import cogvideox, hunyuan_video, hunyuan_video15, ltx, mochi, wan
from .family import AttentionLayer, Family

__all__ = ["FAMILIES", "AttentionLayer", "Family", "family_of"]

FAMILIES = (
    wan.FAMILY,
    hunyuan_video.FAMILY,
    hunyuan_video15.FAMILY,
    cogvideox.FAMILY,
    ltx.FAMILY,
    ltx.FAMILY_2,
    mochi.FAMILY,
)
_BY_CLASS = {name: family for family in FAMILIES for name in family.transformers}


def family_of(transformer: Any) -> Family | None:
    """The family of a transformer, by the names of its class and of those it inherits from."""
    names = (kind.__name__ for kind in type(transformer).__mro__)
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), None)
