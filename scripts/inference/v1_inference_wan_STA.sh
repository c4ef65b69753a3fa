#!/usr/bin/env bash
# Text to video with Wan 2.1 and sliding tile attention, from the repository root:
#
#   bash scripts/inference/v1_inference_wan_STA.sh [options of examples/wan_t2v_sta.py]
#
# 69 frames of 768 x 1280 are 18 x 48 x 80 tokens: 3 x 6 x 10 tiles of 6 x 8 x 8.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python}" examples/wan_t2v_sta.py \
  --model_id "${MODEL_BASE:-Wan-AI/Wan2.1-T2V-14B-Diffusers}" \
  --height 768 --width 1280 --num_frames 69 --num_inference_steps 50 --guidance_scale 5.0 \
  --window 3x3x3 --dense_timesteps 12 --output_file "${OUTPUT:-wan_sta_output.mp4}" "$@"
