"""Renders one video with one attention type, and leaves a record beside it."""

from __future__ import annotations

import datetime
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...functional.video_tokens import VideoTokens
from .. import UsageError
from ..bench import commit, machine_info, versions
from ..capture import CaptureWriter, Selection
from ..stitch.sources import open_sources
from ..video import Clip, write_clip
from .attention import ModelAttention, video_transformers
from .kinds import Kind
from .model import call_arguments
from .quality import quality_of

MARGIN = 64 << 20  # bytes beyond the captures that the disk must have


@dataclass(frozen=True)
class Wanted:
    """What is to be rendered: everything that the video depends on, but the attention type.

    ``call``: arguments of the pipeline, None where it has its own; ``model``: --model_path.
    """

    model: str
    call: dict[str, Any]
    seed: int
    fps: float
    dtype: str | None
    compile: bool = False

    def options(self, kind: Kind) -> dict[str, Any]:
        """As they stand in the record: the same options give the same video."""
        return {
            "model_path": self.model, "attention_type": kind.text, **self.call,
            "seed": self.seed, "fps": self.fps, "dtype": self.dtype, "compile": self.compile,
        }  # fmt: skip


@dataclass(frozen=True)
class CaptureOptions:
    """--save_inputs and what belongs to it."""

    folder: Path
    selection: Selection
    file_format: str


@dataclass
class Outcome:
    """What came out of a rendering."""

    path: Path
    seconds: list[float] = field(default_factory=list)  # of each step
    record: dict[str, Any] = field(default_factory=dict)
    capture_failure: str | None = None


Say = Callable[[str], None]


def render(
    pipe: Any,
    kind: Kind,
    wanted: Wanted,
    path: Path,
    *,
    say: Say,
    capture: CaptureOptions | None = None,
) -> Outcome:
    """Renders, writes the video to ``path`` and the record beside it.

    Raises:
        UsageError: options that the model cannot serve, or captures that the disk cannot hold.
        RuntimeError: the attention type cannot run here; the message says why.
        OSError: the video cannot be written.
    """
    arguments = call_arguments(pipe, wanted.call)
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = arguments.get("num_inference_steps") or default_of(pipe, "num_inference_steps")
    writer = None
    if capture is not None:
        writer = CaptureWriter(capture.folder, kind.label, capture.selection, capture.file_format)
        if writer.replaced:
            say(f"{writer.replaced} captures of {kind.label} from before are replaced")
    outcome = Outcome(path)
    device = pipe._execution_device

    def before_first(tokens: VideoTokens, query: Tensor) -> None:
        say(_tokens_text(tokens, query))
        if writer is not None:
            say(plan(pipe, writer, query, steps))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        ModelAttention(pipe, kind, writer=writer, before_first=before_first) as attention,
        _compiled(pipe) if wanted.compile else nullcontext(),
    ):
        try:
            frames = _generate(pipe, arguments, wanted.seed, steps, outcome.seconds, device)
        finally:
            if writer is not None:
                writer.close()
    for line in _calls_text(attention):
        say(line)
    if writer is not None:
        outcome.capture_failure = writer.failure
        say(f"{len(writer.saved)} of {writer.total_calls} calls are captured in {writer.folder}")
    write_clip(path, frames, wanted.fps)
    outcome.record = _record(wanted.options(kind), outcome, attention, device)
    outcome.record["quality"] = quality_of(path, wanted, kind)
    path.with_suffix(".json").write_text(json.dumps(outcome.record, indent=1) + "\n", "utf-8")
    say(_result_text(outcome))
    return outcome


def _generate(
    pipe: Any, arguments: dict[str, Any], seed: int, steps: int, seconds: list[float], device: Any
) -> Clip:
    """uint8 [F, H, W, 3]; fills in the seconds of each step."""
    with _progress(steps) as advance:
        now = time.perf_counter()

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            nonlocal now
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            before, now = now, time.perf_counter()
            seconds.append(now - before)
            advance(seconds[-1])
            return tensors

        with torch.no_grad():
            video = pipe(
                **arguments,
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=after_step,
                output_type="np",
            ).frames[0]
    if not np.isfinite(video).all():
        raise RuntimeError("the video has values that are not finite; try another --dtype")
    return (np.asarray(video) * 255).round().clip(0, 255).astype(np.uint8)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[pace]}"), TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=steps, pace="")
        yield lambda pace: progress.update(task, advance=1, pace=f"{pace:.2f} s per step")


@contextmanager
def _compiled(pipe: Any) -> Iterator[None]:
    """The blocks of the transformers are compiled: all blocks of a kind share one graph."""
    blocks = []
    for transformer, family in video_transformers(pipe):
        names = [x.name.rpartition(".")[0] for x in family.attention_layers(transformer)]
        blocks += [transformer.get_submodule(name) for name in dict.fromkeys(names)]
    for block in blocks:
        block.compile(mode="max-autotune-no-cudagraphs")
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()  # the next attention type must not count as a recompilation


def default_of(pipe: Any, name: str) -> Any:
    return inspect.signature(type(pipe).__call__).parameters[name].default


def _tokens_text(tokens: VideoTokens, query: Tensor) -> str:
    batch, heads, length, head_dim = query.shape
    frames, rows, columns = tokens.grid
    return (
        f"{length:,} tokens ({frames} x {rows} x {columns} video, {tokens.text_length} text), "
        f"batch {batch}, {heads} heads of {head_dim}, {str(query.dtype).removeprefix('torch.')}"
    )


def plan(pipe: Any, writer: CaptureWriter, query: Tensor, steps: int) -> str:
    """How much will be written.

    Raises:
        UsageError: layers or steps that are not there, or more than the disk has.
    """
    transformer, family = video_transformers(pipe)[0]
    layers = len(family.attention_layers(transformer))
    for name, asked, there in (
        ("layers", writer.selection.layers, layers),
        ("steps", writer.selection.steps, steps),
    ):
        absent = [str(n) for n in asked or () if n >= there]
        if absent:
            raise UsageError(
                f"--{name} {','.join(absent)}: there are {name} 0 to {there - 1} in this run"
            )
    count = writer.selection.planned(layers, steps)
    each = 3 * query.numel() * query.element_size()
    free = shutil.disk_usage(writer.folder).free
    if count * each + MARGIN > free:
        fits = max(0, (free - MARGIN) // each)
        raise UsageError(
            f"{count} captures of {_size(each)} take {_size(count * each)}, and {writer.folder} "
            f"has {_size(free)} free; --max_captures {fits} would fit"
        )
    return (
        f"up to {count} captures of {_size(each)}, {_size(count * each)} in all, go to "
        f"{writer.folder} ({_size(free)} free)"
    )


def _size(nbytes: float) -> str:
    power = 1 if nbytes < 1e6 else 2 if nbytes < 1e9 else 3
    return f"{nbytes / 1000**power:.4g} {('kB', 'MB', 'GB')[power - 1]}"


def _calls_text(attention: ModelAttention) -> Iterator[str]:
    yield (
        f"{attention.sparse_calls} sparse and {attention.dense_calls} dense attention calls, none "
        "fell back"
    )
    for kind, verdicts in attention.backends.items():
        chosen = next((v.backend for v in verdicts if v.chosen), "none")
        before = [f"{v.backend}: {v.reason}" for v in verdicts if v.reason is not None]
        yield f"{kind} calls ran on {'; '.join([chosen, *before])}"


def _result_text(outcome: Outcome) -> str:
    steady = outcome.seconds[1:] or outcome.seconds
    text = f"wrote {outcome.path}: {np.mean(steady):.3g} s per step"
    if memory := outcome.record["peak_memory_bytes"]:
        text += f", {memory / 2**30:.1f} GiB at most"
    quality = outcome.record["quality"]
    if quality is not None:
        psnr = "equal" if quality["psnr_db"] is None else f"{quality['psnr_db']:.1f} dB"
        text += f"; against {quality['reference']}: {psnr}"
    return text


def _record(
    options: dict[str, Any], outcome: Outcome, attention: ModelAttention, device: torch.device
) -> dict[str, Any]:
    [source], _ = open_sources([outcome.path])
    cuda = device.type == "cuda"
    return {
        "options": options,
        "video": {"frames": source.frames, "height": source.height, "width": source.width},
        "backends": {
            kind: next((v.backend for v in verdicts if v.chosen), "none")
            for kind, verdicts in attention.backends.items()
        },
        "sparse_calls": attention.sparse_calls,
        "dense_calls": attention.dense_calls,
        "seconds_per_step": [round(x, 5) for x in outcome.seconds],
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "machine": machine_info(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
