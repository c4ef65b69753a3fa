"""The C++ backend on a CPU against its peers: torch SDPA (dense) and FlexAttention (same mask).

The measure is "dense share": (time of dense SDPA * density of the mask) / our time. At 1.0 a block
costs what it costs inside a dense SDPA, so that the whole of the sparsity is gained.

    python benchmarks/bench_cpu.py            # 8192 tokens, 4 heads, 13 of 128 blocks of 64 per row
    python benchmarks/bench_cpu.py --quick    # a short look
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from video_attn import BlockMask, attention
from video_attn.backends import cpu
from video_attn.tools.bench import (
    Record,
    Result,
    Timing,
    WrongResultError,
    print_table,
    require_correct,
    time_interleaved,
    write_record,
)

# Relative error against torch in fp32: some roundings of each dtype.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
OURS, DENSE, FLEX = "video_attn cpu", "torch SDPA, dense", "FlexAttention"
BACKWARD_FACTOR = 2.5  # floating-point operations of backward over forward


@dataclass(frozen=True)
class Case:
    """One problem: tensors that want gradients, a mask, and what describes them."""

    tensors: tuple[Tensor, Tensor, Tensor]
    grad: Tensor
    mask: BlockMask
    problem: dict[str, object]

    @property
    def flops(self) -> int:
        q = self.tensors[0]
        return self.mask.flops(q.shape[3], batch=q.shape[0], heads=q.shape[1])


def make_case(options: argparse.Namespace, dtype_name: str) -> Case:
    """Random inputs and, for every head and query block, random lists of ``--kept`` key blocks."""
    generator = torch.Generator().manual_seed(0)
    size = options.block_size
    blocks = -(-options.seq_len // size)
    chance = torch.rand(1, options.heads, blocks, blocks, generator=generator)
    lists = chance.topk(min(options.kept, blocks), -1).indices.sort(-1).values.int()
    length = options.seq_len
    mask = BlockMask.from_indices(lists, size, size, q_len=length, kv_len=length)
    mask.transposed()  # made once per mask, as in training
    shape = (1, options.heads, length, options.head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    dtype = DTYPES[dtype_name]
    tensors = tuple(x.to(dtype).requires_grad_() for x in (q, k, v))
    problem = {
        "dtype": dtype_name,
        "heads": options.heads,
        "seq_len": length,
        "head_dim": options.head_dim,
        "block_size": size,
        "kept_blocks": lists.shape[3],
        "blocks": blocks,
        "density": round(mask.density(), 5),
    }
    return Case(tensors, grad.to(dtype), mask, problem)  # type: ignore[arg-type]


@cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def check(case: Case) -> None:
    """Refuses to go on with results that are off: the last head against SDPA with a token mask.

    Raises:
        WrongResultError: out, or a gradient, is not what SDPA says in fp32.
    """
    limit = LIMITS[case.grad.dtype]
    out = attention(*case.tensors, case.mask, backend="cpu")
    got = (out, *torch.autograd.grad(out, case.tensors, case.grad))
    q, k, v = (x.detach()[:, -1:].float().requires_grad_() for x in case.tensors)
    lists = case.mask.kv_indices[:, -1:]
    last = replace(case.mask, kv_indices=lists, kv_num_blocks=case.mask.kv_num_blocks[:, -1:])
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=last.to_token_mask())
    expected = (exact, *torch.autograd.grad(exact, (q, k, v), case.grad[:, -1:].float()))
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        require_correct(f"{OURS}, {name}", x.detach()[:, -1:], y.detach(), limit)


def forward_providers(case: Case, with_flex: bool) -> dict[str, Callable[[], object]]:
    q, k, v = (x.detach() for x in case.tensors)
    providers: dict[str, Callable[[], object]] = {
        OURS: lambda: attention(q, k, v, case.mask, backend="cpu"),
        DENSE: lambda: F.scaled_dot_product_attention(q, k, v),
    }
    if with_flex:
        flex_mask, flex = case.mask.to_flex(), compiled_flex()
        require_correct(
            FLEX,
            flex(q, k, v, block_mask=flex_mask),
            attention(q, k, v, case.mask, backend="cpu"),
            2 * LIMITS[q.dtype],
        )
        providers[FLEX] = lambda: flex(q, k, v, block_mask=flex_mask)
    return providers


def backward_providers(case: Case) -> dict[str, Callable[[], object]]:
    sparse = attention(*case.tensors, case.mask, backend="cpu")
    dense = F.scaled_dot_product_attention(*case.tensors)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, case.tensors, case.grad, retain_graph=True)

    return {OURS: lambda: gradients(sparse), DENSE: lambda: gradients(dense)}


def results_of(case: Case, direction: str, timings: dict[str, Timing]) -> list[Result]:
    factor = 1.0 if direction == "forward" else BACKWARD_FACTOR
    density = case.mask.density()
    dense_share = timings[DENSE].median * density
    results = []
    for name, timing in timings.items():
        flops = factor * case.flops / (density if name == DENSE else 1.0)
        metrics = {
            "tflops": flops / timing.median / 1e12,
            "dense_share": dense_share / timing.median,
            "speed_up_over_dense": timings[DENSE].median / timing.median,
        }
        results.append(Result({**case.problem, "pass": direction}, name, timing, metrics))
    return results


def run(options: argparse.Namespace) -> list[Result]:
    """All results; a case whose results are wrong stops the run."""
    results = []
    for dtype_name in options.dtype:
        case = make_case(options, dtype_name)
        check(case)
        providers = {"forward": forward_providers(case, options.flex)}
        if not options.forward_only:
            providers["backward"] = backward_providers(case)
        for direction, peers in providers.items():
            timings = time_interleaved(peers, repeats=options.repeats)
            results += results_of(case, direction, timings)
    return results


def print_results(results: list[Result]) -> None:
    problem = results[0].problem
    title = (
        f"{problem['heads']} heads, {problem['seq_len']} tokens, head_dim {problem['head_dim']}, "
        f"{problem['kept_blocks']} of {problem['blocks']} blocks of {problem['block_size']} per "
        f"row; {torch.get_num_threads()} threads; {cpu.description()}"
    )
    columns = ("dtype", "pass", "provider", "median (p20 to p80)", "GFLOPS", "share", "speed-up")
    rows = [
        (
            r.problem["dtype"],
            r.problem["pass"],
            r.provider,
            r.timing,
            f"{r.metrics['tflops'] * 1e3:.0f}",
            f"{r.metrics['dense_share']:.2f}",
            f"{r.metrics['speed_up_over_dense']:.2f}x",
        )
        for r in results
    ]
    print_table(title, columns, rows)
    print("share: (time of dense SDPA x density) / time. FlexAttention has no backward on a CPU.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    add("--seq-len", type=int, default=8192, help="tokens (default 8192)")
    add("--heads", type=int, default=4, help="heads (default 4)")
    add("--head-dim", type=int, default=128, help="head_dim (default 128)")
    add("--block-size", type=int, default=64, help="tokens per block (default 64)")
    add("--kept", type=int, default=13, help="key blocks per query block (default 13)")
    add("--repeats", type=int, default=9, help="timed calls of each provider (default 9)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    add("--forward-only", action="store_true", help="leave out the backward pass")
    add("--flex", action=argparse.BooleanOptionalAction, default=True, help="FlexAttention too")
    add("--quick", action="store_true", help="2048 tokens, 3 repeats, no FlexAttention")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seq_len, options.repeats, options.flex = 2048, 3, False
    for name in ("seq_len", "heads", "head_dim", "block_size", "kept", "repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        results = run(options)
    except WrongResultError as error:
        print(f"error: {error}")
        return 1
    print_results(results)
    write_record(Record.of("bench_cpu", results, "cpu"), options.output)
    print(f"record: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
