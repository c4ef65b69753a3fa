"""Calibrate on heads of a known kind: time of the search, time predicted and measured, and errors.

20 heads of smooth random features at the 75,600 tokens of Wan at 720p: near in all axes, in space,
in time, by content, and at everything. What heads are given is searched for as by
`video-attn calibrate`; then the layer runs as `apply` would run it, and its time is compared with
the predicted one, its heads' errors with the budget.

    python benchmarks/bench_calibrate.py                 # on a GPU
    python benchmarks/bench_calibrate.py --grid 6x8x8 --heads 5 --device cpu
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from video_attn import VideoTokens
from video_attn.layout import as_triple
from video_attn.tools.bench import (
    Record,
    Result,
    print_table,
    record_path,
    time_interleaved,
    write_record,
)
from video_attn.tools.calibrate import Calibration, calibrate, candidates_for, measure_costs
from video_attn.tools.calibrate.errors import dense_in_fp32, head_of
from video_attn.tools.capture import Capture, Facts
from video_attn.tools.capture.files import file_name, save_capture
from video_attn.tools.devices import chosen_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from known_heads import known_head, smooth_features

HEAD_DIM = 128
KINDS = ["local"] * 8 + ["local in space"] * 4 + ["local in time"] * 3 + ["by content"] * 3
KINDS += ["global"] * 2
WIDTHS = {"local": (4.0, 8.0, 8.0), "local in space": (math.inf, 8.0, 8.0),
          "local in time": (1.5, math.inf, math.inf)}  # fmt: skip


def layer(grid: tuple[int, int, int], heads: int, device: torch.device, dtype: torch.dtype):
    """q, k, v [1, heads, S, 128] as a model lays them out, [B, S, H, D] in memory."""
    shape = (1, math.prod(grid), heads, HEAD_DIM)
    q, k, v = (torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in "qkv")
    for head in range(heads):
        kind = KINDS[head * len(KINDS) // heads]
        one = known_head(
            kind, grid, dim=HEAD_DIM, seed=head, widths=WIDTHS.get(kind), device=device
        )
        q[:, head], k[:, head] = one[0][:, 0], one[1][:, 0]
        v[:, head] = smooth_features(grid, HEAD_DIM, seed=head, device=device)
    return q, k, v


def errors(found: Calibration, out: Tensor, exact: list[Tensor]) -> list[float]:
    """Of each head of the layer as it ran."""
    gaps = [
        (out[:, head, None].float() - one).norm() / one.norm() for head, one in enumerate(exact)
    ]
    return [float(gap) for gap in gaps]


def run(args: argparse.Namespace) -> Iterator[Result]:
    device = chosen_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = VideoTokens(as_triple(args.grid, "--grid"))
    q, k, v = layer(tokens.grid, args.heads, device, dtype)
    options = {"patterns": ["sta", "vsa", "radial", "dense"], "precisions": args.precisions}
    with tempfile.TemporaryDirectory() as folder:
        facts = Facts(kernel="sdpa", layer=0, step=0, grid=tokens.grid, text_length=0,
                      text_first=False)  # fmt: skip
        capture = Capture(*(x.cpu().contiguous() for x in (q, k, v)), facts)
        save_capture(capture, Path(folder) / file_name("sdpa", 0, "safetensors"))
        start = time.perf_counter()
        costs = measure_costs(
            candidates_for(tokens, options["patterns"], args.precisions), device=device,
            head_dim=HEAD_DIM, dtype=dtype, repeats=3,
            grids=[tokens.grid],
        )  # fmt: skip
        measured = time.perf_counter() - start
        start = time.perf_counter()
        found = calibrate(
            captured=folder, costs=costs, device=device, budget=args.budgets[0], **options
        )
        searched = time.perf_counter() - start
    exact = [dense_in_fp32(*head_of((q, k, v), head, device), None) for head in range(args.heads)]
    problem = {"grid": args.grid, "tokens": tokens.sequence_length, "heads": args.heads,
               "head_dim": HEAD_DIM, "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
    whole = {"search_seconds": searched, "costs_seconds": measured,
             "worst_fit": max(c.worst_fit for c in costs.costs.values()),
             "predicted_ms": found.dense_seconds * 1e3}  # fmt: skip
    patterns = {"dense": found.candidates[0].pattern}
    facts_of = {"dense": whole}
    outs = {}
    for budget in args.budgets:
        choice = found.at(budget)[0, 0]
        name = f"budget {budget:g}"
        patterns[name] = found.pattern_for(choice)
        outs[name] = patterns[name].attend(q, k, v, tokens)
        reached = errors(found, outs[name], exact)
        facts_of[name] = {
            "budget": budget, "worst_error": max(reached),
            "mean_error": sum(reached) / len(reached), "launches": float(len(choice.groups)),
            "predicted_ms": choice.seconds * 1e3,
        }  # fmt: skip
        print(name, "; ".join(
            f"{found.candidates[n].name}: heads {','.join(map(str, heads))}"
            for n, heads in choice.groups.items()
        ))  # fmt: skip
    runs = {name: lambda p=pattern: p.attend(q, k, v, tokens) for name, pattern in patterns.items()}
    for name, timing in time_interleaved(runs, device=device, repeats=args.repeats).items():
        metrics = facts_of[name]
        metrics["measured_over_predicted"] = timing.median * 1e3 / metrics["predicted_ms"]
        yield Result(problem, name, timing, metrics)


def show(results: list[Result]) -> None:
    dense = results[0]
    rows = [
        [
            r.provider, f"{r.metrics['predicted_ms']:.2f}", f"{r.timing.median * 1e3:.2f}",
            f"{r.metrics['measured_over_predicted'] - 1:+.1%}",
            f"{dense.timing.median / r.timing.median:.2f}",
            *(f"{r.metrics[n]:.3f}" if n in r.metrics else "–"
              for n in ("worst_error", "mean_error")),
            f"{r.metrics.get('launches', 1):.0f}",
        ]
        for r in results
    ]  # fmt: skip
    metrics = dense.metrics
    title = (
        f"{dense.problem['heads']} heads at {dense.problem['tokens']:,} tokens: search "
        f"{metrics['search_seconds']:.1f} s, costs {metrics['costs_seconds']:.1f} s "
        f"(worst fit {metrics['worst_fit']:.1%})"
    )
    print_table(
        title,
        ("layer", "predicted ms", "measured ms", "off", "speed-up", "worst error", "mean error",
         "launches"), rows,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--grid", default="21x45x80", help="tokens of the video (default 21x45x80)")
    add("--heads", type=int, default=20, help="of the layer (default 20)")
    add("--precisions", nargs="+", default=["native", "sage_fp8"])
    add("--budgets", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    add("--repeats", type=int, default=5, help="of each timing (default 5)")
    add("--device", help="default a GPU if there is one")
    add("--output", type=Path, help="default benchmarks/results/calibrate_MODEL.json")
    args = parser.parse_args(argv)
    device = chosen_device(args.device)
    with torch.no_grad():
        results = list(run(args))
    show(results)
    path = args.output or record_path("calibrate", device)
    write_record(Record.of("calibrate", results, device), path)
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
