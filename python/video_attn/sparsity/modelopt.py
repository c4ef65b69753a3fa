"""The bridge to nvidia-modelopt: its method "vsa", on our kernels.

modelopt finds methods by name and takes the highest version of each. Ours is a version above its
own, so that code written for it (``mtsa.sparsify(model, config)`` with ``"method": "vsa"``) runs
here without ``fastvideo_kernel``; what modelopt itself does around a method stays as it is.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor

from ..functional.vsa import video_sparse

logger = logging.getLogger("video_attn")
_VERSION = "v1.1"


def register_with_modelopt(*, gate: float | None = None) -> type:
    """Makes modelopt's method "vsa" run on video_attn. A second call changes the gate.

    Args:
        gate: weight of the coarse branch where a call brings none: None adds it as it is, as
            modelopt says; 0 leaves it out, so that ``top_k_ratio`` 1 is dense attention.

    Returns:
        The class that was registered.

    Raises:
        ImportError: modelopt is not installed, or is one without sparse attention.
    """
    try:
        from modelopt.torch.sparsity.attention_sparsity.methods import registry
    except ImportError as error:
        raise ImportError(
            "register_with_modelopt() needs nvidia-modelopt 0.44 or newer: pip install "
            "nvidia-modelopt. Without it, `import video_attn.sparsity as mtsa` serves the same code"
        ) from error
    method = _method_class()
    method.default_gate = gate
    if registry._SPARSE_ATTENTION_METHODS.get("vsa", {}).get(_VERSION) is not method:
        registry.register_sparse_method("vsa", version=_VERSION)(method)
    logger.info("modelopt's method 'vsa' runs on video_attn")
    return method


@functools.cache
def _method_class() -> Any:
    from modelopt.torch.sparsity.attention_sparsity.methods.vsa import VSA

    class VideoAttnVSA(VSA):
        """modelopt's VSA with our kernels: any tile volume, head size, dtype and device."""

        default_gate: float | None = None

        def forward_attention(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            gate_compress: Tensor | None = None,
            video_shape: tuple[int, int, int] | None = None,
        ) -> tuple[Tensor, dict[str, Any]]:
            """[B, H, S, D] -> ([B, H, S, D], statistics of the real mask)."""
            if video_shape is not None:
                self.set_video_shape(video_shape)
            # modelopt's checks and their messages: no shape, or one that does not fit.
            tiles = self._compute_metadata(query.shape[2], query.device)["total_tiles"]
            out, mask = video_sparse(
                query, key, value, tuple(self.video_shape),
                top_k_ratio=self.top_k_ratio, tile=self.block_size_3d,
                gate=self.default_gate if gate_compress is None else gate_compress,
                return_mask=True,
            )  # fmt: skip
            kept = mask.kv_indices.shape[-1]
            stats = {
                "sparsity": [1.0 - kept / tiles],
                "phase": "vsa_triton",
                "total_blocks": tiles,
                "sparse_blocks": [tiles - kept],
                "top_k": kept,
                "video_shape": self.video_shape,
            }
            self._last_stats = stats
            return out, stats

    return VideoAttnVSA
