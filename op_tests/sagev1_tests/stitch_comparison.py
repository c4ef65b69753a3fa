"""Puts rendered videos side by side: ``video-attn stitch``."""

import sys

from video_attn.cli import main

if __name__ == "__main__":
    sys.exit(main(["stitch", *sys.argv[1:]]))
