"""Attention in INT8 and FP8: dense, sliding tiles and block lists, by every backend.

    python benchmarks/bench_quantized.py        # on a GPU: dense of 16k, 32k and of 2 x 30 heads of
                                                # 64 channels, STA in tile and raster order, VSA

Each precision is timed as a user calls it, quantization included, and as attention over codes that
exist already. A result that is not near exact attention is not timed. TFLOPS count attended pairs
only. The CUDA quantizers are timed alone too, with the bytes that they read and write, and their
rate as a share of a copy's on the same device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from cases import NEAR, Case, make_dense_case, sta_case, vsa_case
from measure import COLUMNS, rows_of, time_case
from options import Options, run_benchmark
from peers import Provider, Run, dense_peers, flex_peer, quantized_peers, vsa_peers
from torch import Tensor

from video_attn import VideoLayout, attention, native, sliding_tile
from video_attn.backends import cuda_sage, triton
from video_attn.calls import ForwardCall, problem_of
from video_attn.quantize import QUANTIZED_PRECISIONS, QuantizationOptions
from video_attn.registry import backends
from video_attn.tools.bench import Result, elapsed, print_table, say, time_interleaved

# Relative L2 error on normal data; docs/sage_notes.md explains the figures.
ERROR_BOUND = {"native": 1e-2, "sage_fp16": 0.023, "sage_fp8": 0.053, "fp8": 0.065}
OPTIONS = QuantizationOptions()
LATEST = 105.0  # seconds after which no other case begins on a GPU, to end within 120


def our_providers(case: Case, without: tuple[str, ...] = ()) -> list[Provider]:
    """Every (backend, precision) that can serve, and where codes can be reused, without them."""
    found = []
    for precision in ("native", *QUANTIZED_PRECISIONS):
        options = None if precision == "native" else OPTIONS
        problem = problem_of(
            "forward", *case.quiet, case.mask, precision=precision, quantization=options
        )
        for backend in backends():
            if backend.name in ("reference", *without) or backend.refusal(problem) is not None:
                continue
            name, limit = f"video_attn {backend.name}, {precision}", ERROR_BOUND[precision]
            run = partial(_whole, backend=backend.name, precision=precision)
            found.append(Provider(name, run, ours=True, backward=False, limit=limit))
            over_codes = OVER_CODES.get(backend.name) if case.raster is None else None
            if precision != "native" and over_codes is not None:
                run = partial(over_codes, precision=precision)
                name = f"{name}, codes given"
                found.append(Provider(name, run, ours=True, backward=False, limit=limit))
    return found


def _whole(case: Case, backend: str, precision: str) -> Run:
    options = None if precision == "native" else OPTIONS
    rest = {"precision": precision, "backend": backend, "quantization": options}
    if case.raster is None:
        return lambda q, k, v: attention(q, k, v, case.mask, **rest)
    grid, tile, window = case.raster.grid, case.raster.tile, case.problem["window"]
    window = tuple(map(int, window.split("x")))
    return lambda q, k, v: sliding_tile(q, k, v, grid, window, tile=tile, **rest)


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


def quantizer_results(title: str, case: Case, repeats: int) -> list[Result]:
    """The quantizers of ``cuda_sage`` alone: bytes, and their rate beside that of a copy."""
    q, k, v = case.quiet
    calls = {p: _call(case, p) for p in QUANTIZED_PRECISIONS}
    runs: dict[str, Callable[[], object]] = {
        f"cuda_sage quantizers, {p}": partial(cuda_sage.quantize, call) for p, call in calls.items()
    }
    if case.raster is not None:
        places = case.raster.tile_places(q.device)
        for p, call in calls.items():
            runs[f"cuda_sage quantizers, {p}"] = partial(cuda_sage.quantize, call, places)
    # Read twice: k and v, whose channels have a mean and a scale. The codes are written.
    read = q.nbytes + 2 * (k.nbytes + v.nbytes)
    moved = {
        name: read + sum(x.nbytes for x in run() if x is not None) for name, run in runs.items()
    }
    copy, to = torch.cat([q, k, v]), torch.cat([q, k, v])
    runs["copy"] = partial(to.copy_, copy)
    moved["copy"] = 2 * copy.nbytes
    timings = time_interleaved(runs, device=case.device, repeats=repeats, seconds=0.5)
    peak = moved["copy"] / timings["copy"].median
    problem = {"case": title, **case.problem, "pass": "quantize"}
    return [
        Result(problem, name, timing, {
            "gigabytes": moved[name] / 1e9, "gb_per_s": moved[name] / timing.median / 1e9,
            "share_of_copy": moved[name] / timing.median / peak,
        })
        for name, timing in timings.items()
    ]  # fmt: skip


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Case, list[Provider]]]:
    """(title, case, providers), made when their turn comes; Triton where it has other figures."""
    dim, dtype, device = options.head_dim, options.dtype, torch.device(options.device)
    on_gpu = device.type == "cuda"
    for tokens in options.tokens:
        case = make_dense_case(tokens, options.heads, dim, dtype, device)
        peers = [*dense_peers(device), *(quantized_peers() if on_gpu else [])]
        title = f"dense, {tokens} tokens, {options.heads} heads"
        yield title, case, [*our_providers(case), *peers]
    layout = VideoLayout(options.grid, (6, 8, 8), 0)
    case = sta_case(layout, options.window, options.sparse_heads[0], dim, dtype, device)
    grid = "x".join(map(str, layout.grid))
    title = f"STA {grid}, window {case.problem['window']}"
    yield title, case, [*our_providers(case), flex_peer(device)]
    case = replace(case, raster=layout, problem={**case.problem, "order": "raster"})
    yield f"{title}, raster order", case, our_providers(case, ("triton",))
    tokens, heads = options.vsa_tokens, options.sparse_heads[1]
    case = vsa_case(tokens, 64, max(1, tokens // 640), heads, dim, dtype, device, NEAR)
    kept = case.problem["kept_blocks"]
    peers = vsa_peers() if on_gpu else [flex_peer(device)]
    title = f"VSA {tokens} tokens, {kept} neighbouring blocks of 64"
    yield title, case, [*our_providers(case), *peers]
    batch, heads, tokens = options.narrow
    case = make_dense_case(tokens, heads, 64, dtype, device, batch=batch)
    title = f"dense, {batch} x {heads} heads, {tokens} tokens of 64 channels"
    yield title, case, [*our_providers(case, ("triton",)), *dense_peers(device)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = Options("quantized", __doc__)
    asked.sized("--tokens", [16384, 32768], [512], "dense lengths", type=int, nargs="+")
    asked.count("--heads", 16, 1, "heads of dense attention")
    asked.add("--head-dim", type=int, default=128, help="head_dim (128)")
    asked.dtype()
    asked.count("--repeats", 20, 1, "timed calls of each")
    options = asked.parse(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    options.grid, options.window = ((6, 16, 16), (1, 1, 1)) if on_cpu else ((30, 48, 80), (3, 3, 3))
    options.sparse_heads, options.vsa_tokens = ((1, 1), 1280) if on_cpu else ((24, 12), 49152)
    options.narrow = (2, 1, 300) if on_cpu else (2, 30, 17776)
    return options


def bench(options: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    for title, case, providers in cases(options):
        if case.device.type == "cuda" and elapsed() > LATEST:
            say(f"{title}: left out, the run is {elapsed():.0f} s old")
            continue
        say(title)
        found = time_case(case, providers, options.repeats, False)
        print_table(title, COLUMNS, rows_of(found))
        results += [
            Result({"case": title, **r.problem}, r.provider, r.timing, r.metrics, r.failure)
            for r in found
        ]
        if native.component("sage").loaded and case.device.type == "cuda":
            alone = quantizer_results(title, case, options.repeats)
            print_table(f"{title}: quantizers", QUANTIZER_COLUMNS, [*map(quantizer_row, alone)])
            results += alone
    return results


QUANTIZER_COLUMNS = ("provider", "median (p20 to p80)", "GB", "GB/s", "share of a copy")


def quantizer_row(result: Result) -> tuple[object, ...]:
    figures = result.metrics
    rate, share = f"{figures['gb_per_s']:.0f}", f"{figures['share_of_copy']:.2f}"
    return result.provider, result.timing, f"{figures['gigabytes']:.3f}", rate, share


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
