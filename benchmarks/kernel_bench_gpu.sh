#!/usr/bin/env bash
# The documented benchmarks at full size, on a GPU, in about two minutes:
#   kernel_bench_gpu.sh FOLDER [options of video-attn bench-kernels]
# Every kernel on the shapes of video models with errors and registers, then on CogVideoX-2b's shape.
# kernel_bench.json and kernel_bench_cogvideox_2b.json belong into benchmarks/results, as
# kernel_bench_h100.json and so on; then tools/readme_tables.py puts them into docs/compare.md.
set -u
out=$(realpath "${1:?a folder for the results}")
shift
cd "$(dirname "$0")/.."
failed=0
timeout 110 bash bench_quantized_attention.sh --repeats 10 --compare_to_ref --ref-rows 128 -print_vgpr \
  --csv "$out/bench_quantized_attention.csv" --record "$out/kernel_bench.json" \
  --plot "$out/bench_quantized_attention.png" "$@" \
  > "$out/kernel_bench.log" 2>&1 || failed=1
timeout 40 python3 op_tests/op_benchmarks/triton/bench_diffusion_attention.py \
  -b 2 -hq 30 -sq 17776 -d 64 --kernel all -metric all --repeats 10 --compare_to_ref --ref-rows 32 \
  --csv "$out/cogvideox_2b.csv" --record "$out/kernel_bench_cogvideox_2b.json" "$@" >> "$out/kernel_bench.log" 2>&1 || failed=1
tail -n 60 "$out/kernel_bench.log"
exit $failed
