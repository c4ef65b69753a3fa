"""``video-attn quality``: how far videos are from a reference, frame by frame."""
