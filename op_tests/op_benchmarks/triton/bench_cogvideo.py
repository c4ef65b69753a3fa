"""Attention kernels on captured inputs: ``video-attn bench-kernels --load_captured``."""

import sys

from video_attn.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench-kernels", "--load_captured", *sys.argv[1:]]))
