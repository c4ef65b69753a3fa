"""Functions for models: a pattern and :func:`video_attn.attention` in one call.

``sliding_tile``, ``video_sparse`` and ``radial`` take the video in raster order. The functions of
``st_attn`` and ``vsa`` keep the forms that are in use: tile order, and for ``vsa`` padded tiles.
``patterns`` has them as objects, for models. Those of ``sageattention`` know no video, nor does
``named_attention``.
"""

from .block_sparse import (
    block_sparse_attn,
    block_sparse_attn_from_indices,
    block_sparse_attn_varlen,
)
from .head_groups import HeadGroup, HeadGroups
from .named_attention import named_attention
from .patterns import Dense, Radial, SlidingTile, VideoSparse
from .radial_attention import radial
from .sage import sageattn, sageattn_varlen
from .sage_kernels import (
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
)
from .sta import sliding_tile, sliding_tile_attention
from .video_tokens import VideoTokens
from .vsa import video_sparse
from .vsa_padded import video_sparse_attn

__all__ = [
    "Dense",
    "HeadGroup",
    "HeadGroups",
    "Radial",
    "SlidingTile",
    "VideoSparse",
    "VideoTokens",
    "block_sparse_attn",
    "block_sparse_attn_from_indices",
    "block_sparse_attn_varlen",
    "named_attention",
    "radial",
    "sageattn",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_varlen",
    "sliding_tile",
    "sliding_tile_attention",
    "video_sparse",
    "video_sparse_attn",
]
