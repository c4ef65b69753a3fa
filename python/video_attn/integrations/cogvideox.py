"""CogVideoX by hand: its processor for a block mask of your own, and the sequence of a generation.

The joint sequence of a CogVideoX block is [text, video]. A radial block mask says that as it is
(blocks that hold text are dense, frames start after the text), so nothing is permuted.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..attention import attention
from ..block_mask import BlockMask
from ..layout import VideoLayout
from .attention_call import AttentionCall
from .intercept import call_that_attends


class CogVideoXSparseAttnProcessor2_0:  # noqa: N801  the name that people know
    """A CogVideoX attention processor whose attention is block-sparse.

    The processor it stands in front of does all the rest (projections, normalisation, rotary
    positions), so that it serves the plain, the fused and any later one.

    Args:
        mask: over the joint sequence [text, video]; None leaves the inner processor alone, which
            is dense attention, unless ``precision`` or ``backend`` ask for kernels of ours.
        inner: the processor that does the rest; default diffusers' CogVideoXAttnProcessor2_0.
        precision, backend: as in :func:`video_attn.attention`.

    Attributes:
        mask: may be set anew at any time, as a schedule does.
    """

    def __init__(
        self,
        mask: BlockMask | None = None,
        *,
        inner: Any = None,
        precision: str = "native",
        backend: str | None = None,
    ) -> None:
        self.mask = mask
        self.inner = require_diffusers().CogVideoXAttnProcessor2_0() if inner is None else inner
        self.precision = precision
        self.backend = backend

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers calls it: (video [B, V, C], text [B, T, C]) -> (video, text)."""
        arguments = attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        if self.mask is None and self.precision == "native" and self.backend is None:
            return self.inner(*arguments)
        return call_that_attends(self._attend, self.inner, *arguments)

    def _attend(self, call: AttentionCall) -> Tensor:
        call.refuse_more()
        return attention(
            call.query, call.key, call.value, self.mask,
            scale=call.scale, precision=self.precision, backend=self.backend,
        )  # fmt: skip


def layout_of(
    pipe: Any,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
) -> VideoLayout:
    """The sequence of a generation of ``num_frames`` frames of ``height`` x ``width`` pixels.

    What is None is what the pipeline itself would take. The tile is one frame.

    Raises:
        ValueError: sizes that are not positive, or not a multiple of what one token covers.
    """
    config = pipe.transformer.config
    space = pipe.vae_scale_factor_spatial
    defaults = config.sample_height * space, config.sample_width * space, config.sample_frames
    given = (height, width, num_frames)
    for name, value in zip(("height", "width", "num_frames"), given, strict=True):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int or None, got {value!r}")
        step = 1 if name == "num_frames" else space * config.patch_size
        if value < 1 or value % step:
            raise ValueError(f"{name} must be a positive multiple of {step}, got {value}")
    height, width, num_frames = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    patch = space * config.patch_size
    latents = (num_frames - 1) // pipe.vae_scale_factor_temporal + 1
    frames = -(-latents // (config.patch_size_t or 1))
    return _layout((frames, height // patch, width // patch), config.max_text_seq_length)


def _layout(grid: tuple[int, int, int], text_length: int) -> VideoLayout:
    return VideoLayout(grid, (1, *grid[1:]), text_length, text_first=True)


def require_diffusers() -> ModuleType:
    """diffusers' module of attention processors, or an ImportError that says what to install."""
    try:
        from diffusers.models import attention_processor
    except ImportError as error:
        raise ImportError(
            "CogVideoX needs diffusers and transformers: pip install 'video-attn[diffusers]'"
        ) from error
    if not hasattr(attention_processor, "CogVideoXAttnProcessor2_0"):
        raise ImportError(
            "this diffusers is too old for CogVideoX: pip install 'video-attn[diffusers]'"
        )
    return attention_processor
