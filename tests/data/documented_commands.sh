# The command lines of the CogVideoX attention comparison tools, as their documents print them.

./op_tests/sagev1_tests/render_all_attention.sh --stitch

# Render a single attention type
python op_tests/sagev1_tests/sageattn_cogvideo.py --attention_type sagev1

# Render with a local model path
python op_tests/sagev1_tests/sageattn_cogvideo.py \
    --attention_type fav3_fp8 \
    --model_path /path/to/local/model

# Render all types (saves to ./rendered_videos by default)
./op_tests/sagev1_tests/render_all_attention.sh

# Render specific types only
./op_tests/sagev1_tests/render_all_attention.sh --types sagev1,fav3_fp8,fav3_sage

# Custom output directory
./op_tests/sagev1_tests/render_all_attention.sh --output-dir ./my_videos

# Basic usage
python op_tests/sagev1_tests/stitch_comparison.py \
    --input_dir ./op_tests/sagev1_tests/rendered_videos

# Custom output filename
python op_tests/sagev1_tests/stitch_comparison.py \
    --input_dir ./rendered_videos \
    --output my_comparison.mp4

# Larger labels for presentations
python op_tests/sagev1_tests/stitch_comparison.py \
    --input_dir ./rendered_videos \
    --font_size 48

# Custom FPS
python op_tests/sagev1_tests/stitch_comparison.py \
    --input_dir ./rendered_videos \
    --fps 24

# Save first 10 attention inputs (default)
python op_tests/sagev1_tests/sageattn_cogvideo.py \
    --attention_type sagev1 \
    --save_inputs \
    --input_dir ./captured_inputs

# Save more inputs for comprehensive benchmarking
python op_tests/sagev1_tests/sageattn_cogvideo.py \
    --attention_type sagev1 \
    --save_inputs \
    --input_dir ./captured_inputs \
    --max_captures 100

# Save all inputs (use with caution - can be large)
python op_tests/sagev1_tests/sageattn_cogvideo.py \
    --attention_type sagev1 \
    --save_inputs \
    --input_dir ./captured_inputs \
    --max_captures 0

# Benchmark sagev1 kernel
python op_tests/op_benchmarks/triton/bench_cogvideo.py \
    --input_dir ./captured_inputs \
    --kernel sagev1

# Benchmark FA3 FP8 kernel
python op_tests/op_benchmarks/triton/bench_cogvideo.py \
    --input_dir ./captured_inputs \
    --kernel fav3_fp8

# Compare throughput across kernels
python op_tests/op_benchmarks/triton/bench_cogvideo.py \
    --input_dir ./captured_inputs \
    --kernel sdpa \
    -metric throughput

# The command lines of attention kernel benchmarking, as its document prints them.

# Single configuration - FA v2
python op_tests/op_benchmarks/triton/bench_diffusion_attention.py \
    -b 2 -hq 30 -sq 17776 -d 64 \
    -metric throughput

# Single configuration - SageAttn v1 (INT8)
python op_tests/op_benchmarks/triton/bench_diffusion_attention.py \
    -b 2 -hq 30 -sq 17776 -d 64 \
    -qk_int8 \
    -metric all

# Single configuration - FA v3 FP8
python op_tests/op_benchmarks/triton/bench_diffusion_attention.py \
    -b 2 -hq 30 -sq 17776 -d 64 \
    -fp8 \
    -metric all

# Single configuration - SageAttn v1 on FA3
python op_tests/op_benchmarks/triton/bench_diffusion_attention.py \
    -b 2 -hq 30 -sq 17776 -d 64 \
    -fav3_sage \
    -metric all

# Step 1: Capture inputs during model inference
python op_tests/sagev1_tests/sageattn_cogvideo.py \
    --attention_type sagev1 \
    --save_inputs \
    --input_dir ./captured_inputs \
    --max_captures 10

# Step 2: Benchmark all kernels on captured inputs
./bench_quantized_attention_captured.sh

# Or run individually:
python op_tests/op_benchmarks/triton/bench_diffusion_attention.py \
    --load_captured \
    --captured_dir ./captured_inputs \
    -fav3_sage \
    -metric all

./bench_quantized_attention.sh

# Use default directory (./captured_inputs)
./bench_quantized_attention_captured.sh

# Use custom directory
CAPTURED_DIR=/path/to/inputs ./bench_quantized_attention_captured.sh
