"""``video-attn stitch``: videos side by side, in one video with labels."""
