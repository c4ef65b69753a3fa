"""``video-attn calibrate``: the cheapest attention per step, layer and head within a budget."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ...layout import as_triple
from .. import UsageError
from ..capture import Capture
from ..devices import chosen_device
from .candidates import KINDS, Candidate, candidates_for
from .choose import BUDGETS
from .costs import CostModel, count_pairs, measure_costs
from .search import OVER, Calibration, calibrate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn calibrate``."""
    add = parser.add_argument
    add(
        "--captured", type=Path, nargs="+", default=[Path("captured_inputs")], metavar="DIR",
        help="folders of `video-attn render --save_inputs` (default ./captured_inputs)",
    )  # fmt: skip
    add("--patterns", default="sta,vsa,radial", help=f"of {','.join(KINDS)}; dense is always one")
    add("--precisions", default="native", help="native, sage_fp16, sage_fp8, fp8; by commas")
    add("--budget", type=float, default=0.1, help="largest relative L2 error (default 0.1)")
    add("--per", choices=BUDGETS, default="head", help="what the budget holds for")
    add("--objective", choices=("time", "density"), default="time",
        help="what is to be small: time on this machine, or pairs of tokens")  # fmt: skip
    add("--over", choices=OVER, default="worst", help="of several captures of one layer and step")
    add("--num-steps", type=int, help="steps of the runs to come, where captures tell steps apart")
    add("--sta-tile", default="6x8x8", help="tokens of a sliding tile (default 6x8x8)")
    add("--vsa-tile", default="4x4x4", help="tokens of a VSA tile (default 4x4x4)")
    add("--block-size", type=int, default=128, help="of radial masks (default 128)")
    add("--costs", type=Path, help="a file of --measure-costs; default: measured now")
    add("--measure-costs", type=Path, metavar="FILE",
        help="measure what launches take on this machine, keep it in FILE")  # fmt: skip
    add("--output", type=Path, default=Path("schedule.json"), help="default schedule.json")
    add("--plot", type=Path, metavar="PNG", help="a picture of the choice")
    add("--device", help="cpu, cuda or cuda:1; default a GPU if there is one")
    add("--backend", help="one backend for all candidates; default the best for each")


def run(args: argparse.Namespace) -> int:
    """Searches, prints the choice, writes the schedule; 0."""
    device = chosen_device(args.device)
    if not args.budget > 0:
        raise UsageError(f"--budget must be > 0, got {args.budget:g}")
    if args.objective == "density" and (args.costs or args.measure_costs):
        raise UsageError("--costs and --measure-costs are for --objective time")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise UsageError(f"--plot must end in .png, got {args.plot}")
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("captures", total=None)

        def costs(candidates: Sequence[Candidate], capture: Capture) -> CostModel:
            return _costs(args, device, candidates, capture, lambda text: bar.log(f"timing {text}"))

        try:
            found = calibrate(
                args.captured,
                lambda tokens: candidates_for(
                    tokens, args.patterns.split(","), args.precisions.split(","),
                    sta_tile=as_triple(args.sta_tile, "--sta-tile"),
                    vsa_tile=as_triple(args.vsa_tile, "--vsa-tile"), block_size=args.block_size,
                ),
                costs,
                budget=args.budget, per=args.per, over=args.over, device=device,
                backend=args.backend, kept=args.output.with_suffix(".errors.json"),
                progress=lambda text, done, of: bar.update(
                    task, description=text, completed=done, total=of
                ),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
    _write(args, found)
    _print(found)
    return 0


def _costs(
    args: argparse.Namespace, device: torch.device, candidates: Sequence[Candidate],
    capture: Capture, progress: object,
) -> CostModel:  # fmt: skip
    if args.objective == "density":
        return count_pairs(candidates, capture.q.shape[3])
    if args.costs is not None:
        return CostModel.load(args.costs)
    model = measure_costs(
        candidates, device=device, head_dim=capture.q.shape[3], dtype=capture.q.dtype,
        backend=args.backend, progress=progress,  # type: ignore[arg-type]
    )  # fmt: skip
    if args.measure_costs is not None:
        model.save(args.measure_costs)
    return model


def _write(args: argparse.Namespace, found: Calibration) -> None:
    from ...integrations.schedule_file import write_schedule_file

    write_schedule_file(found.schedule_file(args.num_steps), args.output)
    if args.plot is not None:
        from .pictures import draw

        draw(found, args.plot)
    print(f"schedule: {args.output}")


def _print(found: Calibration) -> None:
    from ..bench import print_table

    unit, factor = ("Mpairs", 1e-6) if found.costs.is_count else ("ms", 1e3)
    rows = []
    for (step, layer), choice in sorted(found.choices.items()):
        groups = "; ".join(
            f"{found.candidates[number].name}: {len(heads)}"
            for number, heads in choice.groups.items()
        )
        rows.append(
            [step, layer, groups, f"{max(choice.errors):.3f}", f"{choice.layer_error:.3f}",
             f"{choice.seconds * factor:.4g}"]
        )  # fmt: skip
    title = (
        f"budget {found.budget:g} per {found.per}: {found.seconds * factor:.4g} {unit} predicted, "
        f"dense {found.dense_seconds * factor:.4g} {unit}"
    )
    print_table(title, ("step", "layer", "heads", "worst", "layer error", unit), rows)
