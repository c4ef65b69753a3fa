"""video_attn.calibrate(): from a pipeline, or from captures, to a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...functional.video_tokens import VideoTokens
from ...layout import Triple
from .. import UsageError
from ..capture import Capture
from ..devices import chosen_device
from .calibration import Calibration
from .candidates import KINDS, Candidate, candidates_for
from .costs import CostModel, count_pairs, measure_costs
from .search import CostsOf, Progress, search

if TYPE_CHECKING:
    from .pipeline import Runs

OBJECTIVES = ("time", "density")


def calibrate(
    pipe: Any = None,
    prompts: Sequence[str] = (),
    *,
    captured: Path | str | Sequence[Path | str] = (),
    steps: Sequence[int] = (0,),
    layers: Sequence[int] | None = None,
    call: Mapping[str, Any] | None = None,
    patterns: Sequence[str] = KINDS,
    precisions: Sequence[str] = ("native",),
    budget: float = 0.1,
    per: str = "head",
    over: str = "worst",
    objective: str = "time",
    costs: CostModel | Path | str | None = None,
    num_steps: int | None = None,
    sta_tile: Triple = (6, 8, 8),
    vsa_tile: Triple = (4, 4, 4),
    block_size: int = 128,
    check_latents: bool = False,
    output: Path | str | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    progress: Progress = lambda text, done, of: None,
    say: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """The cheapest attention per step, layer and head within an error budget.

    ::

        found = video_attn.calibrate(pipe, ["a red panda"], steps=[0, 5, 20], budget=0.1)
        video_attn.integrations.apply(pipe, Dense(), schedule=found.schedule())

    Args:
        pipe: a pipeline of diffusers, or the folder of one. prompts: what is rendered, dense, until
            the last of ``steps``; q, k and v of these steps are captured.
        captured: instead of ``pipe``, folders of captures; with ``pipe``, the one folder where its
            captures go, default ``captured_inputs``. Those that are there are used again.
        layers: captured, None for all. call: further arguments of the pipeline's call, such as
            ``height``, ``num_frames``, ``num_inference_steps``.
        patterns: what heads may be given, of "sta", "vsa", "radial", "dense". precisions: of
            each, "native", "sage_fp16", "sage_fp8", "fp8". What the model does by itself always
            may.
        budget: the largest error, 0 to 1: relative L2 of a head's output against dense attention
            in fp32. 0 is dense, 1 the cheapest there is.
        per: what the budget holds for: "head", "layer" (root mean square of its heads) or "sum"
            (of all heads of all layers and steps).
        over: of several captures of a step and layer the "worst" error counts, or the "mean".
        objective: what is to be small, "time" on this machine or "density" (pairs of tokens).
        costs: what launches take, as measured before; None measures it now.
        num_steps: denoising steps of the runs to come; of ``pipe``, known.
        sta_tile, vsa_tile, block_size: of the patterns.
        check_latents: render again with the schedule in one captured step alone, and measure how
            far the latents after it are: ``Calibration.latents``. Needs ``pipe``.
        output: schedule file to write (.json); measured errors are kept beside it, so a search that
            was killed goes on where it was.
        device, backend: where candidates run, and by what; default a GPU if there is one, and the
            best backend for each.
        progress: told (what, done, of how many). say: told a line for people.

    Returns:
        what was found: ``.schedule()``, ``.save(path)``, ``.choices``, ``.at(budget)``.

    Raises:
        ValueError: arguments that do not fit together, or captures that do not tell enough.
        OSError: a file that cannot be read or written.
    """
    place = torch.device(device) if isinstance(device, torch.device) else chosen_device(device)
    costs_of = _costs(objective, costs, place, backend, say)
    folders = [Path(x) for x in ([captured] if isinstance(captured, (str, Path)) else captured)]
    runs: Runs | None = None
    if pipe is not None:
        runs = _runs(pipe, prompts, steps, layers, call or {}, place)
        num_steps = runs.num_steps if num_steps is None else num_steps
        folders = runs.capture(_own_folder(folders), say)
    elif not folders:
        raise UsageError("there must be a pipe with prompts, or folders of captures")
    elif prompts or call or check_latents:
        raise UsageError("prompts, call and check_latents need a pipe")

    def candidates(tokens: VideoTokens) -> list[Candidate]:
        return candidates_for(
            tokens, patterns, precisions, sta_tile=sta_tile, vsa_tile=vsa_tile,
            block_size=block_size,
        )  # fmt: skip

    path = None if output is None else Path(output)
    found = search(
        folders, candidates, costs_of, budget=budget, per=per, over=over, num_steps=num_steps,
        device=place, backend=backend, progress=progress,
        kept=None if path is None else path.with_suffix(".errors.json"),
    )  # fmt: skip
    if check_latents and runs is not None:
        from .pipeline import latent_differences

        found.latents.update(latent_differences(runs, found.schedule()))
    if path is not None:
        found.save(path)
    return found


def _own_folder(captured: Sequence[Path]) -> Path:
    """Where the captures of a pipeline go."""
    if len(captured) > 1:
        raise UsageError("captured must be one folder where the captures of pipe go")
    return captured[0] if captured else Path("captured_inputs")


def _costs(
    objective: str, costs: CostModel | Path | str | None, device: torch.device,
    backend: str | None, say: Callable[[str], None],
) -> CostsOf:  # fmt: skip
    """What gives the cost model for the candidates and the size of a capture."""
    if objective not in OBJECTIVES:
        raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")

    def model(chosen: Sequence[Candidate], capture: Capture, tokens: VideoTokens) -> CostModel:
        if objective == "density":
            return count_pairs(chosen, capture.q.shape[3])
        if costs is not None:
            known = costs if isinstance(costs, CostModel) else CostModel.load(Path(costs))
            known.check(capture.q.shape[3], capture.q.dtype, backend)
            return known
        return measure_costs(
            chosen, device=device, head_dim=capture.q.shape[3], dtype=capture.q.dtype,
            backend=backend, grids=[tokens.grid] if device.type == "cuda" else None,
            progress=lambda text: say(f"timing {text}"),
        )  # fmt: skip

    return model


def _runs(
    pipe: Any, prompts: Sequence[str], steps: Sequence[int], layers: Sequence[int] | None,
    call: Mapping[str, Any], device: torch.device,
) -> Runs:  # fmt: skip
    """The runs of a pipeline, or of the one in a folder."""
    from ..render.model import load_pipeline
    from .pipeline import Runs

    if isinstance(prompts, str):
        raise UsageError("prompts must be a list of texts, got one text")
    name = f"{type(pipe).__name__} {getattr(pipe, 'name_or_path', '')}".strip()
    if isinstance(pipe, (str, Path)):
        name = str(pipe)
        pipe = load_pipeline(
            name, dtype=None, device=str(device), offload="none", tiling=False
        )  # fmt: skip
    return Runs(pipe, name, list(prompts), list(steps), layers, call)
