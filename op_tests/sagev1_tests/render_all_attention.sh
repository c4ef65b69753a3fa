#!/usr/bin/env bash
# Renders the same video with every attention type: `video-attn compare`, captures as .pt files.
exec python3 -m video_attn.cli compare --capture_format pt "$@"
