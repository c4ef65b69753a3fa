"""Attention in INT8 and FP8: dense, sliding tiles and block lists, by every backend.

    python benchmarks/bench_quantized.py                # on a GPU: dense 16k and 32k, STA, VSA

Each precision is timed as a user calls it, quantization included, and as attention over codes that
exist already. A result that is not near exact attention is not timed. TFLOPS count attended pairs
only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from cases import DTYPES, NEAR, Case, make_dense_case, sta_case, vsa_case
from measure import COLUMNS, rows_of, time_case
from peers import CannotRunError, Provider, Run, dense_peers, flex_peer, quantized_peers, vsa_peers
from torch import Tensor

from video_attn import VideoLayout, attention
from video_attn.backends import cuda_sage, triton
from video_attn.calls import ForwardCall, problem_of
from video_attn.quantize import QUANTIZED_PRECISIONS, QuantizationOptions
from video_attn.registry import backends
from video_attn.tools.bench import (
    Record,
    Result,
    WrongResultError,
    print_table,
    record_path,
    say,
    write_record,
)

# Relative L2 error on normal data; docs/sage_notes.md explains the figures.
ERROR_BOUND = {"native": 1e-2, "sage_fp16": 0.023, "sage_fp8": 0.053, "fp8": 0.065}
OPTIONS = QuantizationOptions()


def our_providers(case: Case) -> list[Provider]:
    """Every (backend, precision) that can serve, and where codes can be reused, without them."""
    found = []
    for precision in ("native", *QUANTIZED_PRECISIONS):
        options = None if precision == "native" else OPTIONS
        problem = problem_of(
            "forward", *case.quiet, case.mask, precision=precision, quantization=options
        )
        for backend in backends():
            if backend.name == "reference" or backend.refusal(problem) is not None:
                continue
            name, limit = f"video_attn {backend.name}, {precision}", ERROR_BOUND[precision]
            run = partial(_whole, backend=backend.name, precision=precision)
            found.append(Provider(name, run, ours=True, backward=False, limit=limit))
            over_codes = OVER_CODES.get(backend.name)
            if precision != "native" and over_codes is not None:
                run = partial(over_codes, precision=precision)
                name = f"{name}, codes given"
                found.append(Provider(name, run, ours=True, backward=False, limit=limit))
    return found


def _whole(case: Case, backend: str, precision: str) -> Run:
    options = None if precision == "native" else OPTIONS
    return lambda q, k, v: attention(
        q, k, v, case.mask, precision=precision, backend=backend, quantization=options
    )


def _cuda_sage_codes(case: Case, precision: str) -> Run:
    """Attention by the compiled kernels over codes made once."""
    call = _call(case, precision)
    codes = cuda_sage.quantize(call)
    return lambda *_: cuda_sage.attend(call, codes)[0]


def _triton_codes(case: Case, precision: str) -> Run:
    """Attention by the Triton kernels over codes made once."""
    from video_attn.kernels.launch import run_launches

    call = _call(case, precision)
    q, k, v, mask = call.q, call.k, call.v, call.mask
    codes, before = triton.quantize_launches(
        q, k, v, mask, scale=call.scale, precision=precision, options=OPTIONS
    )
    out, lse = call.empty_results()
    attend = triton.quantized_launches(
        codes, out, lse, mask, kv_len=k.shape[2], scale=call.scale, is_causal=False,
        row=triton.chosen_row(precision, mask, q, k, v),
    )  # fmt: skip
    run_launches(before, q.device)

    def run(*_: Tensor) -> Tensor:
        run_launches(attend, q.device)
        return out

    return run


def _call(case: Case, precision: str) -> ForwardCall:
    q, k, v = case.quiet
    return ForwardCall(q, k, v, case.mask, q.shape[3] ** -0.5, False, precision, OPTIONS)


OVER_CODES: dict[str, Callable[..., Run]] = {"cuda_sage": _cuda_sage_codes, "triton": _triton_codes}


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Case, list[Provider]]]:
    """(title, case, peers), made when their turn comes."""
    dim, dtype, device = options.head_dim, options.dtype, torch.device(options.device)
    on_gpu = device.type == "cuda"
    for tokens in options.tokens:
        case = make_dense_case(tokens, options.heads, dim, dtype, device)
        peers = [*dense_peers(device), *(quantized_peers() if on_gpu else [])]
        yield f"dense, {tokens} tokens, {options.heads} heads", case, peers
    layout = VideoLayout(options.grid, (6, 8, 8), 0)
    case = sta_case(layout, options.window, options.sparse_heads[0], dim, dtype, device)
    grid = "x".join(map(str, layout.grid))
    yield f"STA {grid}, window {case.problem['window']}", case, [flex_peer(device)]
    tokens, heads = options.vsa_tokens, options.sparse_heads[1]
    case = vsa_case(tokens, 64, max(1, tokens // 640), heads, dim, dtype, device, NEAR)
    kept = case.problem["kept_blocks"]
    peers = vsa_peers() if on_gpu else [flex_peer(device)]
    yield f"VSA {tokens} tokens, {kept} neighbouring blocks of 64", case, peers


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--device", default="cuda" if gpu else "cpu", help="default: cuda if there, else cpu")
    add("--tokens", type=int, nargs="+", help="dense lengths (16384 32768; on a CPU 512)")
    add("--heads", type=int, help="heads of dense attention (16; on a CPU 1)")
    add("--head-dim", type=int, default=128, help="head_dim (128)")
    add("--dtype", choices=list(DTYPES), help="bfloat16; on a CPU float32")
    add("--repeats", type=int, help="timed calls of each (20; on a CPU 1)")
    add("--output", type=Path, help="JSON record (benchmarks/results/quantized_MODEL.json)")
    options = parser.parse_args(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    for name, on_gpu, small in (
        ("tokens", [16384, 32768], [512]),
        ("heads", 16, 1),
        ("grid", (30, 48, 80), (6, 16, 16)),
        ("window", (3, 3, 3), (1, 1, 1)),
        ("sparse_heads", (24, 12), (1, 1)),
        ("vsa_tokens", 49152, 1280),
        ("dtype", "bfloat16", "float32"),
        ("repeats", 20, 1),
    ):
        if getattr(options, name, None) is None:
            setattr(options, name, small if on_cpu else on_gpu)
    options.output = options.output or record_path("quantized", options.device)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    results: list[Result] = []
    try:
        for title, case, peers in cases(options):
            say(title)
            found = time_case(case, [*our_providers(case), *peers], options.repeats, False)
            print_table(title, COLUMNS, rows_of(found))
            results += [
                Result({"case": title, **r.problem}, r.provider, r.timing, r.metrics, r.failure)
                for r in found
            ]
    except (WrongResultError, CannotRunError) as error:
        print(f"error: {error}")
        return 1
    write_record(Record.of("bench_quantized", results, options.device), options.output)
    print(f"record: {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
