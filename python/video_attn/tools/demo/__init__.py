"""``video-attn demo``: dense and sparse attention on the tokens of a real video clip."""
