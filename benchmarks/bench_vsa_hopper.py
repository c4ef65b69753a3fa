"""Block-sparse attention as VSA uses it: 64-token blocks, a random top-k list per query block.

    python benchmarks/bench_vsa_hopper.py               # on a GPU: 49152 tokens, 76 of 768 blocks

Runs on every GPU, not on Hopper alone; without a GPU the default is 4096 tokens and 2 heads in
fp32. After the tables stand lines in the form of the original benchmark. Its "TFLOPS" count the
operations of dense attention, whatever is skipped; the effective figures below them count attended
pairs only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec

import torch
from cases import NEAR, RANDOM, Case, vsa_case
from measure import BACKWARD_FACTOR, COLUMNS, rows_of, time_case
from options import Options, run_benchmark
from peers import OURS, backend_names, dense_peers, flex_peer, our_providers, vsa_peers

from video_attn.block_lists import dense_from_lists, lists_from_dense
from video_attn.block_ops import block_mean, select_top_k
from video_attn.device import device_info
from video_attn.tools.bench import (
    Result,
    Timing,
    print_table,
    say,
    time_interleaved,
)
from vsa import video_sparse_attn

# Tokens, heads, blocks kept: the problems of 64 blocks or fewer, which FlashInfer's kernel takes.
OTHERS = ((49152, 12, 64), (16384, 24, 32))


def bench_lists(options: argparse.Namespace, lists: str) -> tuple[Case, list[Result]]:
    """Random or neighbouring lists; prints as it goes."""
    say(f"{lists} lists")
    case = vsa_case(
        options.tokens, options.block_size, options.top_k, options.heads, options.head_dim,
        options.dtype, options.device, lists,
    )  # fmt: skip
    providers = [*our_providers(case), *dense_peers(case.device)]
    if options.flex:
        providers.append(flex_peer(case.device))
    if case.device.type == "cuda" and options.block_size == 64:
        providers += vsa_peers()
    results = time_case(case, providers, options.repeats, options.backward)
    title = (
        f"{options.tokens} tokens, {options.top_k} of {options.tokens // options.block_size} "
        f"{lists} blocks of {options.block_size}, {options.heads} heads, head_dim "
        f"{options.head_dim}, {options.dtype}"
    )
    print_table(title, COLUMNS, rows_of(results))
    return case, results


def time_parts(options: argparse.Namespace, case: Case) -> dict[str, Timing]:
    """What a VSA layer does besides block-sparse attention, and the whole of its forward pass."""
    q, k, v = case.quiet
    size, top_k, mask = options.block_size, options.top_k, case.mask
    assert mask is not None
    full = torch.full((mask.num_kv_blocks,), size, dtype=torch.int32, device=case.device)
    with torch.no_grad():
        means = [block_mean(x, None, size).float() for x in (q, k)]
        scores = means[0] @ means[1].mT

    def transpose() -> object:
        dense = dense_from_lists(mask.kv_num_blocks, mask.kv_indices, mask.num_kv_blocks)
        return lists_from_dense(dense.mT)

    parts: dict[str, Callable[[], object]] = {
        "block means of q, k and v": lambda: [block_mean(x, None, size) for x in (q, k, v)],
        "top-k of the scores": lambda: select_top_k(scores, top_k),
        "transposed lists (once per backward pass)": transpose,
        "vsa.video_sparse_attn, forward": lambda: video_sparse_attn(q, k, v, None, top_k, size),
        "the same, full tiles given as sizes": lambda: video_sparse_attn(
            q, k, v, full, top_k, size
        ),
    }
    if case.device.type == "cuda" and size == 64 and find_spec("fastvideo_kernel"):
        from fastvideo_kernel.ops import video_sparse_attn as theirs

        parts["fastvideo_kernel.ops.video_sparse_attn, forward"] = lambda: theirs(
            q, k, v, full, full, top_k, (4, 4, 4)
        )
    return time_interleaved(parts, device=options.device, repeats=options.repeats, seconds=2.0)


def print_original_lines(case: Case, results: list[Result]) -> None:
    """The original benchmark's lines, then what they mean."""
    assert case.mask is not None
    blocks, kept = case.mask.num_kv_blocks, case.mask.kv_indices.shape[-1]
    print(f"Using topk={kept} kv blocks per q block (out of {blocks} total kv blocks)\n")
    print("=== BLOCK SPARSE ATTENTION BENCHMARK ===")
    ours = {r.problem["pass"]: r for r in results if r.provider == OURS and r.timing}
    for name, factor in (("forward", 1.0), ("backward", BACKWARD_FACTOR)):
        if name in ours and ours[name].timing is not None:
            tflops = factor * case.dense_flops / ours[name].timing.median / 1e12
            print(f"Block Sparse {name.capitalize():<8} - TFLOPS: {tflops:.2f}")
    effective = ", ".join(f"{name} {r.metrics['tflops']:.4g}" for name, r in ours.items())
    print(f"Effective TFLOPS (attended pairs only, as everywhere in this project): {effective}")
    forward, backward = backend_names(case)
    device = device_info(case.device)
    print(f"Backend: forward {forward}, backward {backward}, on {device.name} ({device.arch})")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = Options("vsa", __doc__, "bench_vsa_hopper")
    asked.count("--tokens", 49152, 4096, "sequence length")
    asked.add("--top-k", type=int, help="key blocks per query block (a tenth, rounded down)")
    asked.add("--block-size", type=int, default=64, help="tokens per block (64)")
    asked.count("--heads", 12, 2, "heads")
    asked.add("--head-dim", type=int, default=128, help="head_dim (128)")
    asked.dtype()
    asked.count("--repeats", 20, 9, "timed calls of each provider")
    asked.switch("--backward", "backward too")
    asked.switch("--flex", "FlexAttention too")
    asked.switch("--others", "on a GPU also 64 of 768 blocks, and 24 heads with 32 of 256")
    options = asked.parse(arguments)
    blocks = options.tokens // options.block_size
    if options.top_k is None:
        options.top_k = max(1, blocks // 10)
    if options.tokens % options.block_size or not 1 <= options.top_k <= blocks:
        asked.parser.error("--tokens must be whole blocks, and --top-k 1 to their number")
    return options


def bench(options: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    for lists in (NEAR, RANDOM):
        case, found = bench_lists(options, lists)
        results += found
    if options.others and case.device.type == "cuda":
        for tokens, heads, top_k in OTHERS:
            more = {"tokens": tokens, "heads": heads, "top_k": top_k, "flex": False}
            for lists in (NEAR, RANDOM):
                other = argparse.Namespace(**{**vars(options), **more, "block_size": 64})
                results += bench_lists(other, lists)[1]
    if options.flex and case.device.type == "cpu":
        print("FlexAttention has no backward pass on a CPU.")
    say("parts of a layer")
    parts = time_parts(options, case)
    print_table("parts", ("what", "median (p20 to p80)"), [(n, t) for n, t in parts.items()])
    print_original_lines(case, found)
    return results + [Result(case.problem, name, timing) for name, timing in parts.items()]


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
