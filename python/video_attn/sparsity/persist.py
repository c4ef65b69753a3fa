"""Configurations that outlive a process: export, restore, save, load.

What is kept names every module, so that patterns, callables and changes at run time come out the
same: method, attributes, switch, a video shape set by hand, and the gates.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .attributes import read_triple
from .config import given_attributes, resolved
from .conversion import _carry_out, get_named_sparse_attention_modules
from .gates import GATE, gate_tensors, load_gates
from .module import SparseAttentionModule, original_class
from .roots import roots_of
from .state import ModuleState

CONFIG_FILE = "sparse_attention.json"
GATES_FILE = "sparse_attention_gates.safetensors"
_FORMAT = 1


def export_sparse_attention_config(model: Any) -> dict[str, Any] | None:
    """The sparsification of ``model`` as plain values for JSON; None where there is none.

    ``{"format": 1, "producer": {...}, "modules": {name: {"class", "attributes", "enabled",
    "video_shape", "gate"}}}``.
    """
    modules = get_named_sparse_attention_modules(model)
    if not modules:
        return None
    return {
        "format": _FORMAT,
        "producer": {"name": "video-attn", "version": _version()},
        "modules": {name: _exported(module) for name, module in modules},
    }


def restore_sparse_attention_model(model: Any, exported: Mapping[str, Any]) -> Any:
    """Sparsifies ``model`` as :func:`export_sparse_attention_config` found another one.

    Gates that were exported must be made or loaded besides; see :func:`load`.

    Raises:
        TypeError, ValueError: something else than such an export, or one of a model whose attention
            modules have other names; ``model`` is untouched then.
    """
    if not isinstance(exported, Mapping) or "modules" not in exported:
        raise TypeError(
            "exported must be what export_sparse_attention_config gave, a dict with 'modules', got "
            f"{exported!r}"
        )
    if exported.get("format") != _FORMAT:
        raise ValueError(f"format must be {_FORMAT}, got {exported.get('format')!r}")
    saved = dict(exported["modules"])
    plan = []
    for root in roots_of(model):
        for name, module in root.modules.items():
            if name in saved:
                plan.append((root, module, _restored(name, saved.pop(name))))
    if saved or not plan:
        raise ValueError(
            f"the model has no attention module {next(iter(saved), '')!r}: the configuration is "
            f"that of another model ({len(saved)} modules are missing)"
        )
    _carry_out(plan)
    return model


def save(model: Any, folder: str | Path) -> None:
    """Writes the sparsification of ``model`` into ``folder``: its configuration as JSON, its gates
    as safetensors. The weights of the model are not among them.

    Raises:
        ValueError: ``model`` is not sparsified.
    """
    exported = export_sparse_attention_config(model)
    if exported is None:
        raise ValueError("model is not sparsified: call sparsify(model, config) first")
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(exported, indent=2) + "\n", encoding="utf-8")
    gates = gate_tensors(model)
    if gates:
        save_file({name: x.contiguous() for name, x in gates.items()}, folder / GATES_FILE)
    else:
        (folder / GATES_FILE).unlink(missing_ok=True)  # of an earlier save


def load(model: Any, folder: str | Path) -> Any:
    """Sparsifies ``model`` as :func:`save` wrote it, gates included. Returns ``model``.

    Raises:
        OSError: no such file. ValueError: it is damaged, or of another model.
    """
    folder = Path(folder)
    try:
        exported = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    restore_sparse_attention_model(model, exported)
    if (folder / GATES_FILE).exists():
        load_gates(model, folder / GATES_FILE, score_dtype=None)
    elif any(saved["gate"] for saved in exported["modules"].values()):
        warnings.warn(f"the model had gates, but {folder} has no {GATES_FILE}", stacklevel=2)
    return model


def _exported(module: SparseAttentionModule) -> dict[str, Any]:
    state = module._sparse_attention
    return {
        "class": original_class(module).__name__,
        "attributes": {key: _plain(value) for key, value in state.given.items()},
        "enabled": state.enabled,
        "video_shape": state.video_shape and list(state.video_shape),
        "gate": state.gate_owner is not None,
    }


def _restored(name: str, saved: Mapping[str, Any]) -> ModuleState:
    given = given_attributes(saved["attributes"], name)
    state = ModuleState(name, given, resolved(given))
    state.enabled = bool(saved["enabled"]) and state.attributes is not None
    if saved["video_shape"] is not None:
        state.video_shape = read_triple(saved["video_shape"], "video_shape")
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return list(value)
    if type(value).__name__ == "Schedule":
        names = ("dense_layers", "dense_first_steps", "dense_last_steps")
        return {name: getattr(value, name) for name in names}
    return value


def _version() -> str:
    try:
        return version("video-attn")
    except PackageNotFoundError:
        return "0+source"


__all__ = [
    "GATE",
    "export_sparse_attention_config",
    "load",
    "restore_sparse_attention_model",
    "save",
]
