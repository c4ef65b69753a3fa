"""What a module can be told under :func:`~video_attn.sparsity.sparsify`: a class per method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    field_validator,
    model_validator,
)

from ..integrations.schedule import Schedule
from ..layout import Triple
from ..patterns.radial import RadialRule
from ..quantize import parse_recipe
from ..registry import PRECISIONS, check_backend_name

DEFAULT_RATIO = 0.5


def read_triple(value: object, name: str) -> Triple:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of 3 elements (T, H, W), got {value!r}")
    if len(value) != 3:
        raise ValueError(f"{name} must have 3 elements (T, H, W), got {len(value)}: {value!r}")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value):
        raise ValueError(f"{name} must hold positive integers, got {value!r}")
    return value[0], value[1], value[2]


def triple_field(name: str) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else read_triple(value, name))


Steps = Annotated[StrictInt, Field(ge=0)] | Annotated[float, Field(ge=0, le=1, strict=True)]


class ScheduleConfig(BaseModel):
    """Where attention stays dense: the first layers, the first and last denoising steps.

    A layer is counted among the video self-attention modules of the model, in their order. Steps
    are a number, or a share of all steps from 0 to 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense_layers: Annotated[StrictInt, Field(ge=0)] = 0
    dense_first_steps: Steps = 0
    dense_last_steps: Steps = 0

    @property
    def needs_step(self) -> bool:
        """Whether the index of the denoising step makes a difference."""
        return self.dense_first_steps > 0 or self.dense_last_steps > 0

    def is_dense_step(self, step: int, steps: int) -> bool:
        """Whether step ``step`` of ``steps`` (counted from 0) is dense in all layers."""
        schedule = Schedule(0, self.dense_first_steps, self.dense_last_steps)
        return schedule.is_dense_step(step, steps)


class AttentionAttributes(BaseModel):
    """What every method knows.

    Attributes:
        enable: False leaves the module dense until ``enable_sparse_attention``.
        video_shape: tokens (T, H, W) of the video after patchifying; None: found in each call by
            the model's own arguments, or said by ``with video_shape(model, (T, H, W)):``.
        precision, backend: as in :func:`video_attn.attention`.
        schedule: layers and steps that stay dense.
        on_unsupported: what to do with a call that this method cannot serve (an attention mask
            that is no key padding, dropout, causal attention): "raise", or "dense": run it dense,
            count it, and warn once.
        collect_stats: keep statistics of the real masks, for ``get_stats()``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    _own: ClassVar[tuple[str, ...]] = ()

    method: str
    enable: StrictBool = True
    video_shape: Annotated[Triple | None, triple_field("video_shape")] = None
    precision: str = "native"
    backend: str | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    on_unsupported: Literal["raise", "dense"] = "raise"
    collect_stats: StrictBool = False

    @field_validator("schedule", mode="before")
    @classmethod
    def _read_schedule(cls, value: object) -> object:
        if isinstance(value, Schedule):
            if value.overrides or value.steps:
                raise ValueError("schedule.overrides and schedule.steps are for apply(), not here")
            return ScheduleConfig(
                dense_layers=value.dense_layers,
                dense_first_steps=value.dense_first_steps,
                dense_last_steps=value.dense_last_steps,
            )
        return value

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, value: str) -> str:
        if parse_recipe(value)[0] not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {value!r}")
        return value

    @field_validator("backend")
    @classmethod
    def _check_backend(cls, value: str | None) -> str | None:
        return None if value is None else check_backend_name(value)

    def info(self) -> dict[str, Any]:
        """The figures that say how sparse this is, under the name of the method."""
        own = {name: getattr(self, name) for name in self._own}
        return {"type": self.method, **own, "video_shape": self.video_shape}


class VSAAttributeConfig(AttentionAttributes):
    """Video sparse attention: tiles of queries see the tiles of keys that score highest.

    Attributes:
        block_size_3d: tokens (t, h, w) of a tile, any size; tiles at the border may be partial.
        top_k_ratio: share of the key tiles that each query tile keeps, in (0, 1]; rounded up to
            whole tiles. 1 - top_k_ratio is the sparsity.
        top_k: the same as a number of tiles; one of the two.
        gate: the weight of the coarse branch (attention over the means of the tiles). "auto": the
            module's trained ``to_gate_compress`` if it has one, otherwise no coarse branch, so that
            ratio 1 is dense attention. "none": never. "sum": weight 1 where there is no trained
            gate, as the original says; only models trained that way should have it.
        score_dtype: round the scores of tiles to this dtype before the choice. "bfloat16" is what
            FastVideo's kernels do, and what checkpoints that were trained with them expect; None
            keeps fp32.
    """

    _own: ClassVar[tuple[str, ...]] = ("block_size_3d", "top_k_ratio", "top_k", "gate")

    method: Literal["vsa"] = "vsa"
    block_size_3d: Annotated[Triple, triple_field("block_size_3d")] = (4, 4, 4)
    top_k_ratio: float | None = None
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    gate: Literal["auto", "none", "sum"] = "auto"
    score_dtype: Literal["bfloat16", "float16"] | None = None

    @field_validator("top_k_ratio", mode="before")
    @classmethod
    def _check_ratio(cls, value: object) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"top_k_ratio must be a number in (0, 1], got {value!r}")
        if not 0 < value <= 1:
            raise ValueError(
                f"top_k_ratio must be in (0, 1]: the share of key tiles kept; got {value}"
            )
        return float(value)

    @model_validator(mode="before")
    @classmethod
    def _one_measure(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        ratio, count = values.get("top_k_ratio"), values.get("top_k")
        if ratio is not None and count is not None:
            raise ValueError(
                f"top_k_ratio and top_k say the same thing: give one, not {ratio!r} and {count!r}"
            )
        return values

    @model_validator(mode="after")
    def _default_measure(self) -> VSAAttributeConfig:
        if self.top_k_ratio is None and self.top_k is None:
            self.__dict__["top_k_ratio"] = DEFAULT_RATIO  # counts as not given
        return self


class SlidingTileAttributeConfig(AttentionAttributes):
    """Sliding tile attention: every query tile sees a window of tiles around it.

    Attributes:
        block_size_3d: tokens (t, h, w) of a tile.
        window: tiles (t, h, w) seen per axis.
    """

    _own: ClassVar[tuple[str, ...]] = ("block_size_3d", "window")

    method: Literal["sta"] = "sta"
    block_size_3d: Annotated[Triple, triple_field("block_size_3d")] = (6, 8, 8)
    window: Annotated[Triple, triple_field("window")] = (3, 3, 3)


class RadialAttributeConfig(AttentionAttributes):
    """Radial attention: the window of a pair of frames shrinks with their distance.

    Attributes:
        block_size: tokens of a mask block.
        model_type: the published rule of "wan", "hunyuan" or "cogvideox"; None: the plain rule.
        decay_factor: scales the windows.
        neighbor_fraction, min_window, split_width, sink_frames, pooling: what else
            :class:`~video_attn.RadialRule` knows; None: as the rule has it.
    """

    _own: ClassVar[tuple[str, ...]] = ("block_size", "model_type", "decay_factor")

    method: Literal["radial"] = "radial"
    block_size: Annotated[StrictInt, Field(ge=1)] = 128
    model_type: Literal["wan", "hunyuan", "cogvideox"] | None = None
    decay_factor: float = 1.0
    neighbor_fraction: float | None = None
    min_window: StrictInt | None = None
    split_width: StrictInt | None = None
    sink_frames: StrictInt | None = None
    pooling: str | None = None

    @model_validator(mode="after")
    def _check_rule(self) -> RadialAttributeConfig:
        _ = self.rule
        return self

    @property
    def rule(self) -> RadialRule:
        """The rule of the pattern."""
        base = RadialRule() if self.model_type is None else RadialRule.for_model(self.model_type)
        fields = ("neighbor_fraction", "min_window", "split_width", "sink_frames", "pooling")
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return dataclasses.replace(base, decay_factor=self.decay_factor, **given)


class DenseAttributeConfig(AttentionAttributes):
    """Dense attention by our kernels, in any of their precisions."""

    method: Literal["dense"] = "dense"


METHODS: dict[str, type[AttentionAttributes]] = {
    "vsa": VSAAttributeConfig,
    "sta": SlidingTileAttributeConfig,
    "radial": RadialAttributeConfig,
    "dense": DenseAttributeConfig,
}
DEFAULT_METHOD = "vsa"
