"""Whole transformers, a few layers of each at its real size: dense and sparse, compiled and not.

    python benchmarks/bench_models.py                       # Wan 14B: dense and sliding tiles
    python benchmarks/bench_models.py --models hunyuan      # another one
    python benchmarks/bench_models.py --all                 # all models, patterns and precisions
    python benchmarks/bench_models.py --all --small         # a CPU: is everything there?

The default ends within 120 s on an H100 (93 s measured, half of it torch.compile); a further model
takes as long as that, a further pattern or precision some 10 s. ``--no-fuse-norms`` measures what
``apply(fuse_norms=True)`` is worth.

The time is that of one call of the transformer. The error is the relative L2 distance of its
output from the dense one, on smooth random latents and random weights: it compares patterns and
precisions with each other, and says nothing about videos.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from model_cases import CASES, ModelCase, make_inputs, make_model
from torch import Tensor

from video_attn import Radial, SlidingTile, VideoSparse
from video_attn.functional.patterns import Pattern
from video_attn.integrations import apply
from video_attn.tools.bench import (
    Record,
    Result,
    Timing,
    print_table,
    record_path,
    say,
    time_interleaved,
    write_record,
)

PATTERNS: dict[str, Pattern] = {
    "sta": SlidingTile((3, 3, 3)),
    "vsa": VideoSparse(top_k_ratio=0.1),
    "radial": Radial(),
}
PRECISIONS = ("native", "sage_fp8", "fp8")
COLUMNS = ("attention", "precision", "torch.compile", "ms", "speed-up", "density", "error")


def variants(options: argparse.Namespace) -> Iterator[tuple[str, str, bool]]:
    """(pattern or "dense", precision, compiled), the dense model first."""
    for compiled in (False, True) if options.compile else (False,):
        yield "dense", "native", compiled
        for pattern in options.patterns:
            for precision in options.precisions:
                if not compiled or (precision == "native" and pattern == options.patterns[0]):
                    yield pattern, precision, compiled


def bench_model(options: argparse.Namespace, case: ModelCase) -> list[Result]:
    """All variants of one model; prints a table."""
    dtype = torch.float32 if options.device.type == "cpu" else torch.bfloat16
    if options.layers:
        case.config["num_layers"] = options.layers
    model = make_model(case, options.device, dtype, options.small)
    inputs = make_inputs(case, model, dtype, options.small)
    results: list[Result] = []
    rows: list[tuple[str, ...]] = []
    dense: Tensor | None = None
    for name, precision, compiled in variants(options):
        say(f"{case.title}: {name} {precision}{', compiled' if compiled else ''}")
        problem = {
            "model": case.title, "class": case.kind, "tokens": list(case.tokens),
            "layers": model.config.num_layers, "attention": name, "precision": precision,
            "compiled": compiled, "small": options.small, "fuse_norms": options.fuse_norms,
        }  # fmt: skip
        try:
            out, timing, density, backend = run(options, model, inputs, name, precision, compiled)
        except (RuntimeError, ValueError) as error:
            words = str(error).splitlines()[0]
            results.append(Result(problem, name, None, failure=words))
            rows.append((name, precision, "yes" if compiled else "", words[:60], "", "", ""))
            continue
        dense = out if dense is None else dense
        metrics = {
            "speed_up": results[0].timing.median / timing.median if results else 1.0,
            "density": density,
            "relative_l2_error": float((out - dense).norm() / dense.norm()),
        }
        results.append(Result({**problem, "backend": backend}, name, timing, metrics))
        rows.append((
            name, precision, "yes" if compiled else "", f"{timing.median * 1e3:.1f}",
            f"{metrics['speed_up']:.2f}", f"{density:.3f}", f"{metrics['relative_l2_error']:.4f}",
        ))  # fmt: skip
    print_table(f"{case.title}, {model.config.num_layers} layers", COLUMNS, rows)
    return results


def run(
    options: argparse.Namespace, model: Any, inputs: dict[str, Any], name: str, precision: str,
    compiled: bool,
) -> tuple[Tensor, Timing, float, str]:  # fmt: skip
    """(output in fp32, time of a call, density, backend) of one variant."""
    called = torch.compile(model) if compiled else model

    def once() -> Tensor:
        with torch.no_grad():
            return called(**inputs, return_dict=False)[0]

    def timed() -> Timing:
        return time_interleaved(
            {"call": once}, device=options.device, repeats=options.repeats, warmup=1
        )["call"]

    try:
        start = time.perf_counter()
        if name == "dense":
            out = once().float().cpu()
            say(f"first call {time.perf_counter() - start:.1f} s")
            return out, timed(), 1.0, "the model's own"
        fuse = options.fuse_norms
        with apply(model, PATTERNS[name], precision=precision, fuse_norms=fuse) as handle:
            out = once().float().cpu()
            say(f"first call {time.perf_counter() - start:.1f} s")
            return out, timed(), handle.density(), handle.backend_name()
    finally:
        if compiled:
            torch.compiler.reset()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--models", nargs="+", choices=tuple(CASES), default=["wan"])
    add("--patterns", nargs="+", choices=tuple(PATTERNS), default=["sta"])
    add("--precisions", nargs="+", choices=PRECISIONS, default=["native"])
    add("--all", action="store_true", help="all models, patterns and precisions: many minutes")
    add("--layers", type=int, help="transformer layers (default 1 to 4)")
    add("--no-compile", dest="compile", action="store_false")
    add("--no-fuse-norms", dest="fuse_norms", action="store_false")
    add("--repeats", type=int, default=5)
    add("--small", action="store_true", help="tiny models and videos, for a CPU")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="JSON (default benchmarks/results/models_GPU.json)")
    options = parser.parse_args(arguments)
    if options.all:
        options.models, options.patterns = list(CASES), list(PATTERNS)
        options.precisions = list(PRECISIONS)
    options.output = options.output or record_path("models", options.device)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    results = [r for name in options.models for r in bench_model(options, CASES[name])]
    write_record(Record.of("bench_models", results, options.device), options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
