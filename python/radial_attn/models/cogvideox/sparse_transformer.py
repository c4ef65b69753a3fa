"""replace_sparse_forward: kept so that scripts that call it run unchanged."""

from __future__ import annotations

from video_attn.integrations.cogvideox import require_diffusers


def replace_sparse_forward() -> None:
    """Makes sure that diffusers has the CogVideoX classes; changes nothing.

    Other implementations need this call to patch the forward methods of all CogVideoX blocks and
    transformers of the process. Here layer and step reach the attention through
    ``replace_cogvideox_attention``, in the one pipeline it is given.

    Raises:
        ImportError: diffusers is missing, or too old for CogVideoX.
    """
    require_diffusers()
