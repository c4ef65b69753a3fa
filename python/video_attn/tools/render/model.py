"""A pipeline from the Hub or from a folder, on the device that is asked for."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from .. import UsageError
from ..devices import chosen_device
from .attention import video_transformers

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_SIZES = ("height", "width", "num_frames")


def load_pipeline(
    path: str, *, dtype: str | None, device: str | None, offload: str, tiling: bool
) -> Any:
    """The pipeline in ``path``, of the class that its model_index.json names.

    Args:
        dtype: default float32 on a CPU; on a GPU float16 for CogVideoX-2b, which was published in
            it, and else bfloat16.

    Raises:
        UsageError: there is no such model, or it has no video transformer that is known.
        OSError: files of it cannot be read, or downloaded.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise UsageError(
            "rendering needs diffusers: pip install 'video-attn[cli,diffusers]'"
        ) from error
    place = chosen_device(device)
    if offload != "none" and place.type == "cpu":
        raise UsageError(
            f"--offload {offload} moves weights off a GPU, and there is none; leave it"
        )
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(f"--model_path {path} has no model_index.json; give a pipeline's folder")
    try:
        with warnings.catch_warnings():  # torch_dtype is what all versions that serve understand
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(path, torch_dtype=_dtype(path, dtype, place))
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"--model_path {path} cannot be loaded: {reason}") from error
    video_transformers(pipe)
    pipe.set_progress_bar_config(disable=True)
    if tiling:
        pipe.vae.enable_tiling()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    else:
        pipe.to(place)
    return pipe


def _dtype(path: str, name: str | None, place: torch.device) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    if place.type == "cpu":
        return torch.float32
    return torch.float16 if path.lower().rstrip("/").endswith("cogvideox-2b") else torch.bfloat16


def model_label(path: str, family: str) -> str:
    """``cogvideox-2b`` of "THUDM/CogVideoX-2b": the family and the rest of the folder's name.

    It has no underscore: behind the first one stands the attention type.
    """
    family = re.sub(r"[^a-z0-9.]+", "", family.lower())
    name = re.sub(r"[^a-z0-9.]+", "-", Path(path).name.lower()).strip("-")
    rest = name.removeprefix(family).strip("-")
    return f"{family}-{rest or 'model'}"


def call_arguments(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the pipeline's call: what is None is left to the pipeline, except the text
    length, which is the transformer's.

    Raises:
        UsageError: the pipeline has no such argument, or a size that the model cannot make.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            raise UsageError(f"--{name}: {type(pipe).__name__} has no such option; leave it out")
    config = video_transformers(pipe)[0][0].config
    length = getattr(config, "max_text_seq_length", None)
    if length is not None and "max_sequence_length" in known:
        given["max_sequence_length"] = length
    spatial = getattr(pipe, "vae_scale_factor_spatial", 8)
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[-1]
    for name in ("height", "width"):
        if given.get(name, 0) % (spatial * patch):
            raise UsageError(f"--{name} {given[name]} must be a multiple of {spatial * patch}")
    return given
