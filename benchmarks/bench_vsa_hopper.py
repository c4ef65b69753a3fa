"""Block-sparse attention as VSA uses it: 64-token blocks, a random top-k list per query block.

    python benchmarks/bench_vsa_hopper.py               # on a GPU: 49152 tokens, 76 of 768 blocks

Runs on every GPU, not on Hopper alone; without a GPU the default is 4096 tokens and 2 heads in
fp32. The last lines have the form of the original benchmark. Its "TFLOPS" count the operations of
dense attention, whatever is skipped; the effective figures below them count attended pairs only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from cases import DTYPES, NEAR, RANDOM, Case, vsa_case
from measure import BACKWARD_FACTOR, COLUMNS, rows_of, time_case
from peers import OURS, backend_names, dense_peers, flex_peer, our_providers, vsa_peers

from video_attn.block_lists import dense_from_lists, lists_from_dense
from video_attn.block_ops import block_mean, select_top_k
from video_attn.device import device_info
from video_attn.tools.bench import (
    Record,
    Result,
    Timing,
    WrongResultError,
    print_table,
    record_path,
    say,
    time_interleaved,
    write_record,
)
from vsa import video_sparse_attn


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--device", default="cuda" if gpu else "cpu", help="default: cuda if there, else cpu")
    add("--tokens", type=int, help="sequence length (49152; on a CPU 4096)")
    add("--top-k", type=int, help="key blocks per query block (a tenth of them, rounded down)")
    add("--block-size", type=int, default=64, help="tokens per block (64)")
    add("--heads", type=int, help="heads (12; on a CPU 2)")
    add("--head-dim", type=int, default=128, help="head_dim (128)")
    add("--dtype", choices=list(DTYPES), help="bfloat16; on a CPU float32")
    add("--repeats", type=int, help="timed calls of each provider (20; on a CPU 9)")
    add("--backward", action=argparse.BooleanOptionalAction, default=True, help="backward too")
    add("--flex", action=argparse.BooleanOptionalAction, default=True, help="FlexAttention too")
    add("--output", type=Path, help="JSON record (benchmarks/results/vsa_MODEL.json)")
    options = parser.parse_args(arguments)
    kind = torch.device(options.device).type
    for name, on_gpu, small in (
        ("tokens", 49152, 4096),
        ("heads", 12, 2),
        ("repeats", 20, 9),
        ("dtype", "bfloat16", "float32"),
        ("output", *[record_path("vsa", options.device)] * 2),
    ):
        if getattr(options, name) is None:
            setattr(options, name, small if kind == "cpu" else on_gpu)
    blocks = options.tokens // options.block_size
    if options.top_k is None:
        options.top_k = max(1, blocks // 10)
    if options.tokens % options.block_size or not 1 <= options.top_k <= blocks:
        parser.error("--tokens must be whole blocks, and --top-k 1 to their number")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    results: list[Result] = []
    try:
        for lists in (NEAR, RANDOM):
            case, found = bench_lists(options, lists)
            results += found
    except WrongResultError as error:
        print(f"error: {error}")
        return 1
    if options.flex and case.device.type == "cpu":
        print("FlexAttention has no backward pass on a CPU.")
    say("parts of a layer")
    parts = time_parts(options, case)
    print_table("parts", ("what", "median (p20 to p80)"), [(n, t) for n, t in parts.items()])
    results += [Result(case.problem, name, timing) for name, timing in parts.items()]
    write_record(Record.of("bench_vsa_hopper", results, options.device), options.output)
    print(f"record: {options.output}\n")
    print_original_lines(case, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
