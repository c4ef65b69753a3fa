"""What a capture is, and its two file formats: ``.safetensors``, and ``.pt`` with known keys.

A ``.pt`` file is a dictionary: ``q``, ``k``, ``v`` (CPU tensors), ``q_shape``, ``k_shape``,
``v_shape``, ``dtype`` (a string), ``call_idx``, ``kwargs`` (``is_causal``, ``softmax_scale``), and
the other fields of :class:`Facts`. A ``.safetensors`` file holds the same tensors and, in its
header, the facts as JSON. Files come from disks of strangers: nothing is ever unpickled but tensors
and plain values, and everything is checked.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from .. import UsageError

FORMATS = ("safetensors", "pt")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NAME = re.compile(r"(.*)_input_(\d+)\.(?:pt|safetensors)")
_HEADER = "video_attn_capture"  # the key in the header of a .safetensors file


class CaptureError(UsageError):
    """A file that is no capture, or a folder without any; the message names it."""


class Facts(BaseModel, frozen=True, strict=True):
    """What is known of a captured call.

    Args:
        kernel: the attention type that ran it. call_idx: its number among the model's calls.
        layout: the order of the dimensions in the file.
        layer, step: counted from 0. timestep: of the scheduler.
        grid: tokens (T, H, W) of the video. text_length: tokens that are no video, at the end of
            the sequence or (text_first) at its start.
        scale: of the scores, None for 1/sqrt(D). is_causal: as in torch. mask: "none", or what kind
            of attn_mask the call had, which is not kept.
    """

    kernel: str = ""
    call_idx: NonNegativeInt = 0
    layout: Literal["bhsd", "bshd"] = "bhsd"
    layer: NonNegativeInt | None = None
    step: NonNegativeInt | None = None
    timestep: float | None = None
    grid: Annotated[
        tuple[PositiveInt, PositiveInt, PositiveInt] | None, Field(strict=False)  # JSON has lists
    ] = None
    text_length: NonNegativeInt | None = None
    text_first: bool | None = None
    scale: float | None = None
    is_causal: bool = False
    mask: str = "none"


@dataclass(frozen=True)
class Capture:
    """q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv], in ``facts.layout``, and facts."""

    q: Tensor
    k: Tensor
    v: Tensor
    facts: Facts

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.q, self.k, self.v))

    def as_bhsd(self) -> Capture:
        """The same in layout "bhsd"."""
        if self.facts.layout == "bhsd":
            return self
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        return Capture(q, k, v, self.facts.model_copy(update={"layout": "bhsd"}))


def file_name(kernel: str, call_idx: int, file_format: str) -> str:
    """Names that sort as the calls came: ``sagev1_input_000012.pt``."""
    return f"{kernel}_input_{call_idx:06d}.{file_format}"


def save_capture(capture: Capture, path: Path) -> None:
    """Writes ``capture`` to ``path``, in the format of its suffix; whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_name(f".{path.name}.part")
    tensors = {"q": capture.q, "k": capture.k, "v": capture.v}
    try:
        if path.suffix == ".pt":
            torch.save(_dictionary(capture), part)
        else:
            save_file(tensors, part, metadata={_HEADER: capture.facts.model_dump_json()})
        part.replace(path)
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _dictionary(capture: Capture) -> dict[str, Any]:
    facts = capture.facts.model_dump()
    tensors = {"q": capture.q, "k": capture.k, "v": capture.v}
    return {
        **tensors,
        **{f"{name}_shape": tuple(x.shape) for name, x in tensors.items()},
        "dtype": str(capture.q.dtype),
        "kwargs": {"is_causal": facts.pop("is_causal"), "softmax_scale": facts["scale"]},
        **facts,
    }


def find_captures(folder: Path) -> list[Path]:
    """The captures in ``folder``, by kernel and call. Other files are passed over.

    Raises:
        CaptureError: there is no such folder, or no capture in it.
    """
    if not folder.is_dir():
        raise CaptureError(f"{folder} is not a folder; capture q, k, v with --save_inputs first")
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and not path.name.startswith(".") and path.is_file():
            found.append((match[1], int(match[2]), path))
    if not found:
        raise CaptureError(
            f"{folder} holds no captures (files named KERNEL_input_NUMBER.pt or .safetensors); "
            "capture q, k, v with --save_inputs first"
        )
    return [path for _, _, path in sorted(found)]


def load_capture(path: Path, layout: str | None = None) -> Capture:
    """The capture in ``path``, its tensors mapped into memory; of any origin, so all is checked.

    Args:
        layout: of files that do not say; default "bhsd".

    Raises:
        CaptureError: it is no capture, or asks to run code; the message says which and why.
    """
    try:
        tensors, facts = _read_pt(path) if path.suffix == ".pt" else _read_safetensors(path)
        facts.setdefault("layout", layout or "bhsd")
        q, k, v = (_tensor(tensors, name) for name in "qkv")
        capture = Capture(q, k, v, _facts(facts, path))
        _check_shapes(capture)
    except CaptureError as error:
        raise CaptureError(f"{path} is not a capture: {error}") from error
    return capture


def _read_pt(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise CaptureError(
            f"it holds more than tensors and plain values, which is refused ({reason})"
        ) from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise CaptureError(f"torch cannot read it ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise CaptureError(f"it holds a {type(content).__name__}, not a dictionary")
    facts = {k: v for k, v in content.items() if k in Facts.model_fields}
    kwargs = content.get("kwargs")
    if isinstance(kwargs, dict):
        scale = kwargs.get("softmax_scale", kwargs.get("scale"))
        facts.setdefault("scale", scale)
        facts.setdefault("is_causal", kwargs.get("is_causal", False))
    return content, facts


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(header)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CaptureError(f"safetensors cannot read it ({_first_line(error)})") from error
    if not isinstance(facts, dict):
        raise CaptureError(f"its facts are a {type(facts).__name__}, not a dictionary")
    return tensors, facts


def _facts(raw: dict[str, Any], path: Path) -> Facts:
    """Facts of the right types; kernel and number from the name of the file where it says none."""
    match = _NAME.fullmatch(path.name)
    if match:
        raw = {"kernel": match[1], "call_idx": int(match[2])} | raw
    try:
        return Facts.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise CaptureError(f"{name} is {first['input']!r}: {first['msg']}") from error


def _tensor(content: Mapping[str, Any], name: str) -> Tensor:
    x = content.get(name)
    if not isinstance(x, Tensor):
        raise CaptureError(
            f"it has no tensor {name!r}, only {', '.join(map(str, content)) or 'nothing'}"
        )
    plain = x.layout == torch.strided and x.device.type == "cpu"
    if x.ndim != 4 or x.dtype not in DTYPES or 0 in x.shape or not plain:
        raise CaptureError(
            f"{name} is {x.dtype} {tuple(x.shape)}, {x.layout} on {x.device.type}; wanted four "
            "dimensions, none empty, of float16, bfloat16 or float32, torch.strided on cpu"
        )
    return x


def _check_shapes(capture: Capture) -> None:
    heads = capture.as_bhsd()
    q, k, v = heads.q.shape, heads.k.shape, heads.v.shape
    if not (q[0] == k[0] == v[0] and q[3] == k[3] and k[1:3] == v[1:3] and q[1] % k[1] == 0):
        raise CaptureError(
            f"q {tuple(q)}, k {tuple(k)} and v {tuple(v)}, as batch, heads, length, head_dim, do "
            "not fit together"
        )
    if not capture.q.dtype == capture.k.dtype == capture.v.dtype:
        raise CaptureError("q, k and v differ in dtype")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
