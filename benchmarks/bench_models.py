"""Whole transformers, a few layers of each at its real size: dense and sparse, compiled and not.

    python benchmarks/bench_models.py                       # Wan 14B, every pattern and precision
    python benchmarks/bench_models.py --models hunyuan      # another one
    python benchmarks/bench_models.py --models wan --patterns sta --precisions native
    python benchmarks/bench_models.py --all                 # all models
    python benchmarks/bench_models.py --all --small         # a CPU: is everything there?

On an H200, Wan took 92 s, half of it torch.compile; the others 20 to 45 s with ``--no-compile``.
``--no-fuse-norms`` measures what ``apply(fuse_norms=True)`` is worth.

The time is that of one call of the transformer. Two errors are kept, relative L2 both:
``attention_error`` is that of attention alone against dense attention in fp32, in heads that look
near, of smooth random video features at the model's size; ``output_error`` is that of the
transformer's output against the dense model's, on smooth random latents and random weights, where
the rounding of bf16 alone makes up to 0.01. Both compare patterns and precisions with each other,
and say nothing about videos.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_cases import CASES, ModelCase, make_inputs, make_model, video_tokens
from near_heads import NearHeads
from torch import Tensor

from video_attn import Dense, Radial, SlidingTile, VideoSparse
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
    "dense": Dense(),
    "sta": SlidingTile((3, 3, 3)),
    "vsa": VideoSparse(top_k_ratio=0.1),
    "radial": Radial(),
}
PRECISIONS = ("native", "sage_fp8", "fp8")
COLUMNS = ("attention", "precision", "torch.compile", "ms", "speed-up", "density", "error")


@dataclass(frozen=True)
class Variant:
    """One way to run a model: attention, precision, and whether torch.compile has it."""

    attention: str
    precision: str = "native"
    compiled: bool = False

    @property
    def is_own(self) -> bool:
        """Whether nothing is applied: the model as it is."""
        return (self.attention, self.precision) == ("dense", "native")

    def __str__(self) -> str:
        return f"{self.attention} {self.precision}{', compiled' if self.compiled else ''}"


def variants(options: argparse.Namespace) -> Iterator[Variant]:
    """The model as it is first; of the compiled ones it and the first pattern."""
    yield Variant("dense")
    for pattern in options.patterns:
        for precision in options.precisions:
            if (pattern, precision) != ("dense", "native"):
                yield Variant(pattern, precision)
    if options.compile:
        yield Variant("dense", compiled=True)
        sparse = [pattern for pattern in options.patterns if pattern != "dense"]
        if sparse:
            yield Variant(sparse[0], compiled=True)


@dataclass(frozen=True)
class Run:
    """What a variant gave: its output in fp32, the time of a call, pairs kept, who computed."""

    out: Tensor
    timing: Timing
    density: float = 1.0
    backend: str = "the model's own"


def bench_model(options: argparse.Namespace, case: ModelCase) -> list[Result]:
    """All variants of one model; prints a table."""
    dtype = torch.float32 if options.device.type == "cpu" else torch.bfloat16
    if options.layers:
        case.config["num_layers"] = options.layers
    model = make_model(case, options.device, dtype, options.small)
    inputs = make_inputs(case, model, dtype, options.small)
    head_dim = model.config.attention_head_dim
    layers = model.config.num_layers + getattr(model.config, "num_single_layers", 0)
    heads = NearHeads(video_tokens(case, options.small), head_dim, options.device, dtype)
    results: list[Result] = []
    dense: Run | None = None
    for variant in variants(options):
        say(f"{case.title}: {variant}")
        problem = {
            "model": case.title, "class": case.kind, "tokens": list(heads.tokens.grid),
            "layers": layers, "attention": variant.attention,
            "precision": variant.precision, "compiled": variant.compiled, "small": options.small,
            "fuse_norms": options.fuse_norms,
        }  # fmt: skip
        try:
            ran = run(options, model, inputs, variant)
            error = heads.error(PATTERNS[variant.attention], variant.precision)
        except Exception as failure:  # a kernel that does not compile, say: others are measured
            words = str(failure).splitlines()[0]
            results.append(Result(problem, variant.attention, None, failure=words))
            continue
        dense = dense or ran
        metrics = {
            "speed_up": dense.timing.median / ran.timing.median,
            "density": ran.density,
            "attention_error": error,
            "output_error": float((ran.out - dense.out).norm() / dense.out.norm()),
        }
        problem["backend"] = ran.backend
        results.append(Result(problem, variant.attention, ran.timing, metrics))
    rows = [row_of(result) for result in results]
    print_table(f"{case.title}, {layers} layers", COLUMNS, rows)
    return results


def row_of(result: Result) -> tuple[str, ...]:
    """A line of the printed table."""
    problem, metrics = result.problem, result.metrics
    how = problem["attention"], problem["precision"], "yes" if problem["compiled"] else ""
    if result.timing is None:
        return (*how, result.failure[:60], "", "", "")
    return (
        *how, f"{result.timing.median * 1e3:.1f}", f"{metrics['speed_up']:.2f}",
        f"{metrics['density']:.3f}", f"{metrics['attention_error']:.4f}",
    )  # fmt: skip


def run(
    options: argparse.Namespace, model: Any, inputs: dict[str, Any], variant: Variant
) -> Run:  # fmt: skip
    """Runs one variant, and leaves the model as it was."""
    called = torch.compile(model) if variant.compiled else model

    def once() -> Tensor:
        with torch.no_grad():
            return called(**inputs, return_dict=False)[0]

    def timed() -> tuple[Tensor, Timing]:
        start = time.perf_counter()
        out = once().float().cpu()
        say(f"first call {time.perf_counter() - start:.1f} s")
        timing = time_interleaved(
            {"call": once}, device=options.device, repeats=options.repeats, warmup=0
        )["call"]
        return out, timing

    try:
        if variant.is_own:
            return Run(*timed())
        with apply(
            model, PATTERNS[variant.attention], precision=variant.precision,
            fuse_norms=options.fuse_norms,
        ) as handle:  # fmt: skip
            out, timing = timed()
            sparse = variant.attention != "dense"
            backend = handle.backend_name(sparse=sparse)
            return Run(out, timing, handle.density(), backend)
    finally:
        if variant.compiled:
            torch.compiler.reset()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--models", nargs="+", choices=tuple(CASES), default=["wan"])
    add("--patterns", nargs="+", choices=tuple(PATTERNS), default=list(PATTERNS))
    add("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    add("--all", action="store_true", help="all models: some six minutes")
    add("--layers", type=int, help="transformer layers (default 1 to 4)")
    add("--no-compile", dest="compile", action="store_false")
    add("--no-fuse-norms", dest="fuse_norms", action="store_false")
    add("--repeats", type=int, default=3, help="timed calls of each (default 3)")
    add("--small", action="store_true", help="tiny models and videos, for a CPU")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where models_MODEL_GPU.json goes, one for each model (default benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    if options.all:
        options.models = list(CASES)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    for name in options.models:
        results = bench_model(options, CASES[name])
        path = record_path(f"models_{name}", options.device)
        path = path if options.output is None else options.output / path.name
        write_record(Record.of("bench_models", results, options.device), path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
