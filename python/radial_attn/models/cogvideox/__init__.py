"""CogVideoX with radial attention."""

from .attention import CogVideoXSparseAttnProcessor2_0, get_window_width
from .inference import replace_cogvideox_attention
from .sparse_transformer import replace_sparse_forward

__all__ = [
    "CogVideoXSparseAttnProcessor2_0",
    "get_window_width",
    "replace_cogvideox_attention",
    "replace_sparse_forward",
]
