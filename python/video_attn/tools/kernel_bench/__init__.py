"""``video-attn bench-kernels``: attention kernels on random or captured q, k, v."""
