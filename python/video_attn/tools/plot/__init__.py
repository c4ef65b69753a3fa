"""``video-attn plot NAME``: pictures of the patterns."""
