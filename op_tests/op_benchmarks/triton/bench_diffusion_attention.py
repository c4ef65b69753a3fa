"""Attention kernels on random or captured inputs: ``video-attn bench-kernels``."""

import sys

from video_attn.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench-kernels", *sys.argv[1:]]))
