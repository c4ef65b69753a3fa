"""``video-attn render`` and ``compare``: the same video with every attention type."""
