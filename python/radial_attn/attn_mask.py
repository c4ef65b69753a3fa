"""MaskMap and SceneAwareMaskMap: the radial block mask of a video, with and without scenes.

Each object stands for one video. Masks are kept by all that they depend on, never per class, so any
number of sizes, models and scenes live side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from video_attn.block_mask import BlockMask
from video_attn.layout import VideoLayout
from video_attn.patterns.radial import RadialRule, frame_density, radial_mask
from video_attn.patterns.scene import Adjacency, Scenes


class MaskMap:
    """The radial masks of a video.

    Args:
        video_token_num: tokens of the video in the sequence; a multiple of ``num_frame``.
        num_frame: latent frames, after temporal patches.
        text_first: the sequence is [text, video] instead of [video, text].

    Raises:
        ValueError: ``video_token_num`` cannot be cut into so many frames.
    """

    scenes: Scenes | None = None

    def __init__(self, video_token_num: int, num_frame: int, *, text_first: bool = False) -> None:
        if num_frame < 1 or video_token_num < 1 or video_token_num % num_frame:
            raise ValueError(
                f"video_token_num {video_token_num} is not a multiple of {num_frame} frames of "
                "tokens"
            )
        self.video_token_num = video_token_num
        self.num_frame = num_frame
        self.text_first = text_first

    def layout(self, query: Tensor) -> VideoLayout:
        """The sequence of ``query`` [S, H, D] or [B, S, H, D]; what is not video is text."""
        if query.dim() not in (3, 4):
            raise ValueError(
                f"query must be [S, H, D] or [B, S, H, D], got shape {tuple(query.shape)}"
            )
        text = query.shape[-3] - self.video_token_num
        if text < 0:
            raise ValueError(
                f"query has {query.shape[-3]} tokens, fewer than the {self.video_token_num} of the "
                "video"
            )
        tokens = self.video_token_num // self.num_frame
        return VideoLayout((self.num_frame, 1, tokens), (1, 1, tokens), text, self.text_first)

    def block_mask(
        self,
        query: Tensor,
        sparse_type: str = "radial",
        block_size: int = 128,
        decay_factor: float = 0.5,
        model_type: str = "cogvideox",
    ) -> BlockMask:
        """The mask for ``video_attn.attention``, on the device of ``query``.

        Args:
            query: [S, H, D] or [B, S, H, D]; only its shape and device are read.
            sparse_type: "radial" or "dense". block_size: tokens of a block.
            decay_factor, model_type: as in ``RadialRule.for_model``.
        """
        layout = self.layout(query)
        rule = RadialRule.for_model(model_type, decay_factor)
        if sparse_type == "radial":
            return radial_mask(
                layout, rule, block_size=block_size, scenes=self.scenes, device=query.device
            )
        if sparse_type != "dense":
            raise ValueError(f"sparse_type must be 'radial' or 'dense', got {sparse_type!r}")
        length = layout.sequence_length
        blocks = -(-length // block_size)
        keep = torch.ones(1, 1, blocks, blocks, dtype=torch.bool, device=query.device)
        return BlockMask.from_dense(keep, block_size, block_size, q_len=length, kv_len=length)

    def queryLogMask(  # noqa: N802  the name in use
        self,
        query: Tensor,
        sparse_type: str = "radial",
        block_size: int = 128,
        decay_factor: float = 0.5,
        model_type: str = "cogvideox",
    ) -> Tensor:
        """:meth:`block_mask` as booleans [N, N], N = ceil(S / block_size)."""
        mask = self.block_mask(query, sparse_type, block_size, decay_factor, model_type)
        return mask.to_dense()[0, 0]


class SceneAwareMaskMap(MaskMap):
    """The radial masks of a video of several scenes.

    Args:
        video_token_num: as in :class:`MaskMap`.
        num_frame: frames of the video, counted in ``unit``.
        scene_boundaries: first frame of each scene, and the end of the last, counted in ``unit``.
            None with a matrix of T x T booleans says which latent frame sees which; None without
            one is plain radial attention.
        scene_adjacency_matrix: which scene (row) sees which (column): a matrix, "adjacent", "all",
            or a function of two scenes.
        unit: "pixel", frames of the decoded video, as a pipeline's ``num_frames``; or "latent".
        straddle, sink, scene_sink, strict, temporal_compression, temporal_patch: as in
            :class:`video_attn.patterns.scene.Scenes`.
        text_first: as in :class:`MaskMap`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        video_token_num: int,
        num_frame: int,
        scene_boundaries: Sequence[int] | None = None,
        scene_adjacency_matrix: Adjacency | None = None,
        *,
        unit: str = "pixel",
        straddle: str = "both",
        sink: str = "obey",
        scene_sink: bool = False,
        strict: bool = False,
        temporal_compression: int = 4,
        temporal_patch: int = 1,
        text_first: bool = False,
    ) -> None:
        latents = num_frame
        if unit == "pixel":
            latents = (num_frame - 1) // temporal_compression + 1
        frames = -(-latents // temporal_patch) if unit == "pixel" else num_frame
        try:
            super().__init__(video_token_num, frames, text_first=text_first)
        except ValueError as error:
            raise ValueError(
                f"{error}, which {num_frame} {unit} frames make; unit says what num_frame counts: "
                "'pixel' or 'latent'"
            ) from None
        if scene_boundaries is not None and scene_adjacency_matrix is None:
            raise ValueError(
                "scene_adjacency_matrix must be given with scene_boundaries: a matrix, "
                "'adjacent', 'all' or a function"
            )
        if scene_adjacency_matrix is None:
            return
        if scene_boundaries is None:
            scene_boundaries, unit, straddle = range(frames + 1), "latent", "both"
        self.scenes = Scenes(
            scene_boundaries,
            scene_adjacency_matrix,
            unit=unit,
            straddle=straddle,
            sink=sink,
            scene_sink=scene_sink,
            strict=strict,
            temporal_compression=temporal_compression,
            temporal_patch=temporal_patch,
            padding_latents=-latents % temporal_patch,
        )
        self.scenes.membership(frames)  # boundaries that do not fit the video raise here

    def scene_density(self, query: Tensor, **options: object) -> Tensor:
        """float64 [S, S]: the share of the token pairs of two scenes (row: queries) that the mask
        computes; ``options`` as in :meth:`block_mask`.
        """
        if self.scenes is None:
            raise ValueError("scene_boundaries were not given, so there are no scenes")
        mask = self.block_mask(query, **options)  # type: ignore[arg-type]
        return self.scenes.density(frame_density(self.layout(query), mask))
