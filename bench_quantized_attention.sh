#!/usr/bin/env bash
# Every attention kernel on the shapes of video models, as BxHxSxD: one process, one CSV.
# Options go to `video-attn bench-kernels`; --scale 0.01 fits a small machine.
exec python3 -m video_attn.cli bench-kernels --kernel all -metric all \
  --shapes 1x5x75600x128 1x24x16452x128 1x3x118808x128 2x2x29760x128 \
  --csv bench_quantized_attention.csv "$@"
