"""A CogVideoX video with one attention type: ``video-attn render``, captures as .pt files."""

import sys

from video_attn.cli import main

if __name__ == "__main__":
    sys.exit(main(["render", "--capture_format", "pt", *sys.argv[1:]]))
