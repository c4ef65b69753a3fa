"""One attention layer of Wan 14B and HunyuanVideo at 720p on several GPUs against one of them.

    torchrun --nproc-per-node 4 benchmarks/bench_distributed.py --backward
    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --models wan --patterns dense sta
    python benchmarks/bench_distributed.py                  # the same on all GPUs of this machine
    python benchmarks/bench_distributed.py --device cpu     # tiny sizes on two CPUs: is all there?
    python benchmarks/bench_distributed.py --plan           # bytes on paper, no GPU

Every rank holds its part of the tokens and ends with its part of the output. One GPU does the same
work alone, in the same run, while the others wait. Efficiency is its time over ranks x the time of
the slowest rank; 1 is perfect. Dense attention by Ulysses stands beside the sparse patterns. A ring
has shards of equal work for STA, even ones for the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from options import Options, run_benchmark
from torch import Tensor

from st_attn import sliding_tile_attention
from video_attn import Dense, Radial, SlidingTile, VideoSparse, VideoTokens
from video_attn.distributed import (
    Shards,
    balanced_shards,
    record_traffic,
    sequence_parallel_attention,
    sequence_parallel_plan,
)
from video_attn.functional.patterns import Pattern
from video_attn.tools.bench import Result, Timing, print_table, say, time_interleaved
from video_attn.tools.bench.check import require_correct

COLUMNS = (
    "attention", "pass", "one GPU", "ms", "speed-up", "efficiency", "MB sent by a rank", "MHz",
)  # fmt: skip
MAX_ERROR = {"dense": 0.02, "sta": 0.02, "vsa": 0.05}  # of bf16; vsa: nearly equal scores may flip
PLAN_RANKS = (8, 16, 32, 64)
PER_HOST = 8


@dataclass(frozen=True)
class Model:
    """The attention of one layer: tokens, heads and channels."""

    tokens: VideoTokens
    heads: int
    head_dim: int
    window: tuple[int, int, int] = (3, 3, 3)
    tile: tuple[int, int, int] = (6, 8, 8)
    vsa_tile: tuple[int, int, int] = (4, 4, 4)

    def patterns(self) -> dict[str, Pattern]:
        return {
            "dense": Dense(),
            "sta": SlidingTile(self.window, self.tile),
            "vsa": VideoSparse(top_k_ratio=0.1, tile=self.vsa_tile, gate=0),
        }


MODELS = {
    "wan": Model(VideoTokens((21, 45, 80)), 40, 128),
    "hunyuan": Model(VideoTokens((33, 45, 80), text_length=256), 24, 128),
}
SMALL = {
    "wan": Model(VideoTokens((4, 6, 8)), 5, 16, (1, 1, 3), (2, 3, 4), (2, 2, 2)),
    "hunyuan": Model(VideoTokens((4, 6, 8), text_length=9), 4, 16, (1, 1, 3), (2, 3, 4), (2, 2, 2)),
}


@dataclass(frozen=True)
class Run:
    """What one rank times: its own part of one attention, and all of it."""

    name: str
    kind: str
    parallel: Callable[..., Tensor]
    alone: Callable[..., Tensor]
    whole: tuple[Tensor, ...]
    shards: Shards

    def part(self) -> list[Tensor]:
        return [self.shards.take(x, dist.get_rank(), 2).contiguous() for x in self.whole]


def make_run(
    model: Model, name: str, kind: str, device: torch.device, head_chunks: int | None = None
) -> Run:
    """STA works on tokens in tile order, as a model that keeps them so does; the others in raster
    order.
    """
    pattern, tokens = model.patterns()[name], model.tokens
    whole = whole_tensors(model, device)
    is_sta = isinstance(pattern, SlidingTile)

    def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sequence_parallel_attention(
            q,
            k,
            v,
            pattern,
            tokens=tokens,
            kind=kind,
            tile_order=is_sta,
            shards=shards,
            head_chunks=head_chunks,
        )

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not is_sta:
            return pattern.attend(q, k, v, tokens)
        return sliding_tile_attention(
            q, k, v, model.window, tokens.text_length, tokens.text_length > 0, tokens.grid,
            tile_size=model.tile,
        )  # fmt: skip

    ranks = dist.get_world_size()
    shards = Shards.even(tokens.sequence_length, ranks)
    if is_sta and kind == "ring":
        shards = balanced_shards(pattern, ranks, tokens=tokens)
    return Run(name, kind, parallel, alone, whole, shards)


def whole_tensors(model: Model, device: torch.device) -> tuple[Tensor, ...]:
    """The same q, k, v [1, H, S, D] on every rank."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, model.tokens.sequence_length, model.heads, model.head_dim)
    return tuple(
        torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2)
        for _ in range(3)
    )


def check(run: Run) -> None:
    """A wrong result is never timed."""
    expected = run.shards.take(run.alone(*run.whole), dist.get_rank(), 2)
    got = run.parallel(*run.part())
    require_correct(f"{run.name}, {run.kind}", got, expected, MAX_ERROR[run.name])


def training(
    function: Callable[..., Tensor], inputs: list[Tensor], backward: bool
) -> Callable[[], None]:
    """A call of ``function``, with its backward pass or without."""
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    grad = torch.randn_like(inputs[0]) if backward else None

    def once() -> None:
        out = function(*inputs)
        if grad is not None:
            torch.autograd.grad(out, inputs, grad)

    return once


def time_alone(run: Run, options: argparse.Namespace, backward: bool) -> Timing:
    """One GPU, the first; the same on all ranks."""
    alone: list[Any] = [None]
    if dist.get_rank() == 0:
        once = training(run.alone, [x.contiguous() for x in run.whole], backward)
        settings = {"repeats": options.repeats, "seconds": options.seconds}
        alone = [time_interleaved({"alone": once}, device=options.device, **settings)["alone"]]
    dist.broadcast_object_list(alone, 0, device=torch.device("cpu"))
    return alone[0]


def time_parallel(
    run: Run, alone: Timing, options: argparse.Namespace, backward: bool
) -> tuple[Timing, int]:
    """(the slowest rank, bytes that the busiest rank sent in one call)."""
    once = training(run.parallel, run.part(), backward)
    with record_traffic() as traffic:
        once()
    share = alone.median / dist.get_world_size()  # all ranks make as many calls
    repeats = min(options.repeats, max(3, int(options.seconds / max(share, 1e-9))))
    dist.barrier()
    mine = time_interleaved({"parallel": once}, device=options.device, repeats=repeats)["parallel"]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, traffic.total))
    timings, sent = zip(*everyone, strict=True)
    return max(timings, key=lambda timing: timing.median), max(sent)


def bench(options: argparse.Namespace) -> list[Result]:
    """All runs, and their table on the first rank."""
    results: list[Result] = []
    rows: list[tuple[str, ...]] = []
    for model_name in options.models:
        model = (SMALL if options.device.type == "cpu" else MODELS)[model_name]
        for name in options.patterns:
            alone: dict[bool, Timing] = {}
            for kind in options.kinds:
                if dist.get_rank() == 0:
                    say(f"{model_name}, {name}, {kind}")
                run = make_run(model, name, kind, options.device, options.head_chunks)
                check(run)
                for backward in (False, True) if options.backward else (False,):
                    is_first = backward not in alone
                    if is_first:
                        alone[backward] = time_alone(run, options, backward)
                    timed = time_parallel(run, alone[backward], options, backward)
                    new, row = summary(model_name, model, run, backward, alone[backward], *timed)
                    results += new if is_first else new[1:]
                    rows.append(row)
    if dist.get_rank() == 0:
        print_table(f"{dist.get_world_size()} ranks, {device_name(options.device)}", COLUMNS, rows)
    return results


def summary(
    model_name: str,
    model: Model,
    run: Run,
    backward: bool,
    alone: Timing,
    slowest: Timing,
    sent: int,
) -> tuple[list[Result], tuple[str, ...]]:
    """The entries of the record, and the row of the table, of one comparison."""
    ranks = dist.get_world_size()
    speed_up = alone.median / slowest.median
    direction = "forward and backward" if backward else "forward"
    problem = {
        "model": model_name, "grid": model.tokens.grid, "ranks": ranks,
        "text": model.tokens.text_length, "heads": model.heads,
        "head_dim": model.head_dim, "pattern": run.name, "pass": direction,
    }  # fmt: skip
    metrics = {"speed_up": speed_up, "efficiency": speed_up / ranks, "sent_mb": sent / 1e6}
    entries = [
        Result(problem, "one GPU", alone),
        Result(problem, f"{ranks} ranks, {run.kind}", slowest, metrics),
    ]
    return entries, (
        f"{model_name}, {run.name}, {run.kind}", direction, f"{alone.median * 1e3:.2f}",
        f"{slowest.median * 1e3:.2f}", f"{speed_up:.2f}", f"{speed_up / ranks:.2f}",
        f"{sent / 1e6:.1f}", "" if slowest.sm_mhz is None else f"{slowest.sm_mhz:.0f}",
    )  # fmt: skip


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def plan_rows() -> list[tuple[str, ...]]:
    """Megabytes that the busiest rank sends in one forward pass, without running anything."""
    rows = []
    for name, model in MODELS.items():
        for ranks in PLAN_RANKS:
            rows.append((name, str(ranks), *(f"{n / 1e6:.0f}" for n in _planned(model, ranks))))
    return rows


def _planned(model: Model, ranks: int) -> list[int]:
    """Ulysses; a dense ring; STA and radial in a ring; and both of a mesh of hosts."""
    tokens, heads, pattern = model.tokens, model.heads, model.patterns()["sta"]
    sta: dict[str, Any] = {
        "tokens": tokens, "tile_order": True, "q_heads": heads,
        "shards": balanced_shards(pattern, ranks, tokens=tokens),
    }  # fmt: skip
    dense: dict[str, Any] = {"tokens": tokens, "q_heads": heads}
    mesh = (ranks // PER_HOST, PER_HOST)
    plans = [
        sequence_parallel_plan(Dense(), ranks, **dense),
        sequence_parallel_plan(
            None,
            ranks,
            kind="ring",
            q_heads=heads,
            shards=Shards.even(tokens.sequence_length, ranks),
        ),
        sequence_parallel_plan(pattern, ranks, kind="ring", **sta),
        sequence_parallel_plan(Radial(), ranks, kind="ring", **dense),
        sequence_parallel_plan(Dense(), mesh, kind="usp", **dense),
        sequence_parallel_plan(pattern, mesh, kind="usp", **sta),
    ]
    busiest = [max(plan.forward_bytes) for plan in plans]
    for plan in plans[-2:]:  # what leaves a host: the ring between hosts
        ring = [sum(n for k, n in sent.items() if "ulysses" not in k) for sent in plan.forward]
        busiest.append(max(ring))
    return busiest


PLAN_COLUMNS = (
    "model", "GPUs", "Ulysses", "ring, dense", "ring, STA", "ring, radial", "hosts, dense",
    "hosts, STA", "between hosts, dense", "between hosts, STA",
)  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    ranks = dist.get_world_size() if dist.is_initialized() else os.environ.get("WORLD_SIZE", "N")
    asked = Options(f"distributed_{ranks}", __doc__, "distributed")
    add = asked.add
    add("--models", nargs="+", choices=MODELS, default=list(MODELS),
        help="one layer of each; on a CPU with tiny sizes")  # fmt: skip
    add("--patterns", nargs="+", choices=MAX_ERROR, default=list(MAX_ERROR))
    add("--kinds", nargs="+", choices=("ulysses", "ring"), default=["ulysses", "ring"])
    add("--head-chunks", type=int, help="cut the heads of a rank so (default: by their size)")
    add("--backward", action="store_true", help="time training too")
    asked.count("--repeats", 10, 3, "calls of each")
    add("--seconds", type=float, default=0.5, help="for them, at least three calls (0.5)")
    add("--ranks", type=int, help="without torchrun: how many to start (all GPUs; of CPUs 2)")
    add("--plan", action="store_true", help="print bytes on paper for 8 to 64 GPUs, and end")
    return asked.parse(arguments)


def start_ranks(options: argparse.Namespace, arguments: list[str]) -> int:
    """This script once for every rank, on this machine; their exit status."""
    ranks = options.ranks or (2 if options.device == "cpu" else torch.cuda.device_count())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    here = [str(ranks), __file__, *arguments]
    return subprocess.run([*launcher, "--nproc-per-node", *here], check=False).returncode


@contextmanager
def process_group(options: argparse.Namespace) -> Iterator[None]:
    """That of the ranks, and ``options.device`` of this one."""
    options.device = torch.device(options.device)
    if options.device.type == "cuda":
        options.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(options.device)
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if options.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.plan:
        title = "MB that the busiest rank sends in a forward pass of one layer, bf16"
        print_table(title, PLAN_COLUMNS, plan_rows())
        return 0
    if not dist.is_initialized() and "RANK" not in os.environ:
        return start_ranks(options, sys.argv[1:] if arguments is None else arguments)
    with process_group(options):
        if dist.get_rank() == 0:
            return run_benchmark(bench, options)
        bench(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
