#!/usr/bin/env bash
# Every attention kernel on the captures in CAPTURED_DIR (./captured_inputs): one process, one CSV.
exec python3 -m video_attn.cli bench-kernels --kernel all -metric all \
  --load_captured --captured_dir "${CAPTURED_DIR:-./captured_inputs}" \
  --csv bench_quantized_attention_captured.csv "$@"
