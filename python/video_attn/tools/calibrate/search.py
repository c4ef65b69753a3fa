"""search(): the errors of every candidate on a folder of captures, and what is chosen of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...functional.video_tokens import VideoTokens
from .. import UsageError
from ..capture import Capture, find_captures, load_capture
from .calibration import Calibration, Place
from .candidates import OWN, Candidate
from .choose import BUDGETS
from .costs import CostModel
from .errors import errors_of_head, head_of
from .memory import Memory, hash_of

OVER = ("worst", "mean")
Progress = Callable[[str, int, int], None]  # what is done now, so many of so many
CostsOf = Callable[[Sequence[Candidate], Capture, VideoTokens], CostModel]


def search(
    captured: Sequence[Path],
    candidates: Callable[[VideoTokens], Sequence[Candidate]],
    costs: CostsOf,
    *,
    budget: float = 0.1,
    per: str = "head",
    over: str = "worst",
    num_steps: int | None = None,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    kept: Path | None = None,
    progress: Progress = lambda text, done, of: None,
) -> Calibration:
    """Finds the cheapest candidate of every head in every captured layer and step.

    Args:
        captured: folders of captures, one for each prompt say. All must be of one size of video,
            and each must tell its grid and layer.
        candidates: for a video, what may be chosen; :func:`.candidates_for` with its options.
        costs: what launches take; :func:`.measure_costs`, or a model that was kept.
        budget, per: see :class:`.Chooser`.
        over: of several captures of one layer and step the "worst" error counts, or the "mean".
        num_steps: of the runs to come, where captures tell steps apart.
        device, backend: where candidates run, and by what.
        kept: a file that keeps the errors of each head, so that a search that was killed goes on
            where it was.
        progress: told the capture, and how many of its heads and candidates are done of how many.

    Raises:
        CaptureError, UsageError: captures that do not tell enough, or do not fit together.
    """
    _check(budget, per, over)
    found: dict[Place, list[NDArray[np.float64]]] = {}
    files: dict[Place, list[Path]] = {}
    hashes: dict[str, str] = {}
    first: tuple[VideoTokens, Sequence[Candidate], CostModel, torch.Size] | None = None
    memory = Memory(kept)
    for path in [path for folder in captured for path in find_captures(folder)]:
        now = partial(progress, path.name)
        capture = load_capture(path).as_bhsd()
        tokens = tokens_of(capture, path)
        if first is None:
            chosen = candidates(tokens)
            if OWN not in chosen:
                raise UsageError("candidates must have Dense() in precision 'native' among them")
            first = tokens, chosen, costs(chosen, capture, tokens), capture.q.shape
        _check_alike(path, (tokens, *capture.q.shape[:2]), (first[0], *first[3][:2]))
        digest = hashes[str(path)] = hash_of(path)
        errors = _errors(
            capture, tokens, first[1], torch.device(device), backend, memory, digest, now
        )  # fmt: skip
        place = (capture.facts.step or 0, capture.facts.layer or 0)
        found.setdefault(place, []).append(errors)
        files.setdefault(place, []).append(path)
    assert first is not None  # find_captures finds one or raises
    reduce = np.max if over == "worst" else np.mean
    all_errors = {place: reduce(np.stack(several), 0) for place, several in found.items()}
    return Calibration(
        first[1], first[0], first[3][0], all_errors, first[2], budget, per, num_steps, files,
        hashes,
    )  # fmt: skip


def _check(budget: float, per: str, over: str) -> None:
    if not 0 <= budget <= 1:
        raise UsageError(f"budget must be from 0 (dense) to 1 (anything), got {budget:g}")
    for name, given, allowed in (("per", per, BUDGETS), ("over", over, OVER)):
        if given not in allowed:
            raise UsageError(f"{name} must be one of {', '.join(allowed)}; got {given!r}")


def _check_alike(path: Path, given: tuple, first: tuple) -> None:
    if given != first:
        names = ("tokens", "batch", "heads")
        differ = [f"{n}: {g}, not {f}" for n, g, f in zip(names, given, first, strict=True)
                  if g != f]  # fmt: skip
        raise UsageError(
            f"{path} differs from the captures before it ({'; '.join(differ)}): calibrate one "
            "size of video at a time"
        )


def _errors(
    capture: Capture, tokens: VideoTokens, candidates: Sequence[Candidate], device: torch.device,
    backend: str | None, memory: Memory, digest: str, progress: Callable[[int, int], None],
) -> NDArray[np.float64]:  # fmt: skip
    """[heads, candidates]; what the memory knows is not measured again."""
    qkv, heads = (capture.q, capture.k, capture.v), capture.q.shape[1]
    suffix = "" if backend is None else f", {backend}"
    keys = [candidate.key + suffix for candidate in candidates]
    errors = np.empty((heads, len(candidates)))
    for head in range(heads):
        done = [memory.known(digest, key, head) for key in keys]
        missing = [n for n, error in enumerate(done) if error is None]
        if missing:
            count = head * len(candidates) + len(candidates) - len(missing)
            q, k, v = head_of(qkv, head, device)
            measured = errors_of_head(
                q, k, v, tokens, [candidates[n] for n in missing], scale=capture.facts.scale,
                backend=backend, progress=partial(_one_more, progress, count, errors.size),
            )  # fmt: skip
            memory.keep(digest, [keys[n] for n in missing], head, measured)
            for n, error in zip(missing, measured, strict=True):
                done[n] = error
        errors[head] = done
    return errors


def _one_more(progress: Callable[[int, int], None], before: int, of: int, done: int) -> None:
    progress(before + done, of)


def tokens_of(capture: Capture, path: Path) -> VideoTokens:
    """How the tokens of a capture lie.

    Raises:
        UsageError: it does not say, or is no self-attention of all tokens.
    """
    facts = capture.facts
    if facts.grid is None or facts.layer is None:
        raise UsageError(
            f"{path} tells no {'grid' if facts.grid is None else 'layer'}: capture with "
            "`video-attn render --save_inputs`, which does"
        )
    if facts.is_causal or facts.mask != "none" or capture.q.shape[2] != capture.k.shape[2]:
        raise UsageError(f"{path} is no self-attention of all tokens: leave it out")
    tokens = VideoTokens(facts.grid, facts.text_length or 0, bool(facts.text_first))
    if tokens.sequence_length != capture.q.shape[2]:
        raise UsageError(
            f"{path} has {capture.q.shape[2]} tokens, but tells a video and text of "
            f"{tokens.sequence_length}"
        )
    return tokens
