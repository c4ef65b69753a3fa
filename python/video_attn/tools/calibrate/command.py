"""``video-attn calibrate``: the cheapest attention per step, layer and head within a budget."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...layout import as_triple
from .. import UsageError
from ..devices import chosen_device
from ..options import file_ending_in, integers, names, positive_int
from .api import OBJECTIVES, calibrate
from .calibration import Calibration
from .candidates import KINDS
from .choose import BUDGETS
from .costs import CostModel, measure_costs
from .search import OVER

_PICTURE = file_ending_in((".png",))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn calibrate``."""
    add = parser.add_argument_group("from captures, or from a pipeline").add_argument
    add(
        "--captured", type=Path, nargs="+", metavar="DIR",
        help="folders of `video-attn render --save_inputs` (default ./captured_inputs); with "
        "--pipe the folder where its captures go",
    )  # fmt: skip
    add("--pipe", metavar="FOLDER", help="a pipeline on disk: it renders until the last of --steps")
    add("--prompts", type=Path, metavar="FILE", help="what it renders, a prompt in every line")
    add("--steps", type=integers, metavar="0,5,20", help="captured denoising steps (default 0)")
    add("--layers", type=integers, metavar="0,5,...", help="captured layers (default all)")
    for name, text in (("num-frames", "frames"), ("height", "pixels"), ("width", "pixels")):
        add(f"--{name}", type=positive_int, metavar="N", help=f"{text} (default the model's)")
    add("--num-steps", type=positive_int, metavar="N",
        help="denoising steps of the runs to come (default of --pipe: the model's)")  # fmt: skip
    add("--check-latents", action="store_true",
        help="render again, with the choice in one captured step alone: how far its latents are "
        "(needs --pipe)")  # fmt: skip
    add = parser.add_argument_group("what may be chosen, and what for").add_argument
    add("--patterns", type=names, default=list(KINDS), metavar="A,B,...",
        help=f"of {','.join(KINDS)} (default all); the model's own always may")  # fmt: skip
    add("--precisions", type=names, default=["native"], metavar="A,B,...",
        help="native, sage_fp16, sage_fp8, fp8 (default native)")  # fmt: skip
    add("--budget", type=float, default=0.1,
        help="largest relative L2 error, 0 (dense) to 1 (the cheapest); default 0.1")  # fmt: skip
    add("--per", choices=BUDGETS, default="head",
        help="what the budget holds for: each head (default), the root mean square of a layer's "
        "heads, or of all heads")  # fmt: skip
    add("--objective", choices=OBJECTIVES, default="time",
        help="what is to be small: time on this machine (default), or pairs of tokens")  # fmt: skip
    add("--over", choices=OVER, default="worst", help="of several captures of one layer and step")
    add("--sta-tile", default="6x8x8", help="tokens of a sliding tile (default 6x8x8)")
    add("--vsa-tile", default="4x4x4", help="tokens of a VSA tile (default 4x4x4)")
    add("--block-size", type=int, default=128, help="of radial masks (default 128)")
    add = parser.add_argument_group("costs").add_argument
    add("--costs", type=Path, metavar="FILE", help="of --measure-costs; default: measured now")
    add("--measure-costs", type=Path, metavar="FILE",
        help="measure what launches take on this machine, keep it in FILE; without captures that "
        "is all that is done")  # fmt: skip
    add = parser.add_argument_group("results").add_argument
    add("--output", type=Path, default=Path("schedule.json"), help="default schedule.json")
    add("--windows", type=Path, metavar="JSON",
        help="also as windows by STEP_LAYER_HEAD, the form of the public search; needs "
        "--patterns sta,dense")  # fmt: skip
    add("--plot", type=_PICTURE, metavar="PNG", help="a picture of the choice")
    add("--explain", type=int, nargs=2, metavar=("LAYER", "HEAD"),
        help="a picture of that head's attention, and what each candidate keeps of it")  # fmt: skip
    add("--explain-step", type=int, metavar="N", help="of this captured step (default the first)")
    add("--explain-plot", type=_PICTURE, metavar="PNG",
        help="where to (default OUTPUT_layerL_headH.png)")  # fmt: skip
    add("--device", help="cpu, cuda or cuda:1; default a GPU if there is one")
    add("--backend", help="one backend for all candidates; default the best for each")


def run(args: argparse.Namespace) -> int:
    """Searches, prints the choice, writes the schedule; 0."""
    _check(args)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("captures", total=None)
        if args.measure_costs is not None and args.pipe is None and args.captured is None:
            _measure(args, bar).save(args.measure_costs)
            print(f"costs: {args.measure_costs}")
            return 0
        try:
            found = calibrate(
                args.pipe, _prompts(args), captured=_folders(args), steps=args.steps or (0,),
                layers=args.layers, call=_call(args), patterns=args.patterns,
                precisions=args.precisions, budget=args.budget, per=args.per, over=args.over,
                objective=args.objective, costs=args.costs, num_steps=args.num_steps,
                sta_tile=as_triple(args.sta_tile, "--sta-tile"),
                vsa_tile=as_triple(args.vsa_tile, "--vsa-tile"), block_size=args.block_size,
                check_latents=args.check_latents, output=args.output, device=args.device,
                backend=args.backend, say=bar.log,
                progress=lambda text, done, of: bar.update(
                    task, description=text, completed=done, total=of
                ),
            )  # fmt: skip
            _write(args, found)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
    _print(found)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.objective == "density" and (args.costs or args.measure_costs):
        raise UsageError("--costs and --measure-costs are for --objective time")
    if args.costs and args.measure_costs:
        raise UsageError("--costs reads what --measure-costs measures: give one of them")
    of_pipe = ("prompts", "steps", "layers", "num_frames", "height", "width", "check_latents")
    given = [f"--{name.replace('_', '-')}" for name in of_pipe if getattr(args, name)]
    if args.pipe is None and given:
        raise UsageError(f"{', '.join(given)}: give --pipe, or leave it out")
    if args.pipe is not None and args.prompts is None:
        raise UsageError("--pipe needs --prompts FILE, a prompt in every line")
    if args.explain is None and (args.explain_step is not None or args.explain_plot):
        raise UsageError("--explain-step and --explain-plot need --explain LAYER HEAD")


def _folders(args: argparse.Namespace) -> list[Path]:
    return [Path("captured_inputs")] if args.captured is None else args.captured


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return []
    try:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {args.prompts} cannot be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {args.prompts} has no prompt: write one in every line")
    return prompts


def _call(args: argparse.Namespace) -> dict[str, Any]:
    if args.pipe is None:
        return {}
    names = ("num_frames", "height", "width")
    return {**{n: getattr(args, n) for n in names}, "num_inference_steps": args.num_steps}


def _measure(args: argparse.Namespace, bar: Any) -> CostModel:
    """The costs of all kinds and precisions that are asked for, in heads of 128 channels."""
    import torch

    from ...functional.video_tokens import VideoTokens
    from .candidates import candidates_for

    device = chosen_device(args.device)
    candidates = candidates_for(
        VideoTokens((18, 48, 48)), args.patterns, args.precisions,
        sta_tile=as_triple(args.sta_tile, "--sta-tile"),
        vsa_tile=as_triple(args.vsa_tile, "--vsa-tile"), block_size=args.block_size,
    )  # fmt: skip
    return measure_costs(
        candidates, device=device, head_dim=128, backend=args.backend,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        progress=lambda text: bar.log(f"timing {text}"),
    )  # fmt: skip


def _write(args: argparse.Namespace, found: Calibration) -> None:
    print(f"schedule: {args.output}")
    if args.measure_costs is not None:
        found.costs.save(args.measure_costs)
        print(f"costs: {args.measure_costs}")
    if args.windows is not None:
        found.save_windows(args.windows)
        print(f"windows: {args.windows}")
    if args.plot is not None:
        from .pictures import draw

        draw(found, args.plot)
        print(f"picture: {args.plot}")
    if args.explain is not None:
        from .explain import draw_explanation, explain

        layer, head = args.explain
        path = args.explain_plot or args.output.with_name(
            f"{args.output.stem}_layer{layer}_head{head}.png"
        )
        step = found.steps[0] if args.explain_step is None else args.explain_step
        kept = explain(found, layer, head, step=step, device=chosen_device(args.device))
        draw_explanation(kept, f"Layer {layer}, head {head}, step {step}", path)
        print(f"explanation: {path}")


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
    for step, gap in found.latents.items():
        print(f"latents after step {step}, by the schedule in this step alone: {gap:.3g} away")
