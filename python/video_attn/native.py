"""The compiled components of the package: which are here, what they were built from, why not.

A component is a library `_<name>.so` beside this file (for `planning` a Python module, with the
tag of its interpreter in the name), with a record `_<name>.json` that the build wrote
(tools/build_record.py). Nothing here raises on a broken install: a component that cannot be
loaded says why, and the rest of the package works without it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from sysconfig import get_config_var
from types import MappingProxyType
from typing import Any

import torch

NAMES = ("cpu", "sta", "vsa", "sage", "planning")
_MODULE = "planning"  # the component that is a Python module, and registers no operators
# Without the last three pip would take the wheel that it keeps from the build that failed.
REBUILD = (
    "rebuild with `pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .` "
    "(in place: `make build`)"
)


@dataclass(frozen=True)
class Component:
    """One compiled component.

    Args:
        name: one of ``NAMES``.
        loaded: its operators are registered with torch, or its module is imported.
        reason: why it is not loaded; None when it is.
        record: what the build wrote down (version, git_revision, architectures, compiler, torch,
            cuda); empty when there is no record.
    """

    name: str
    loaded: bool
    reason: str | None
    record: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)


def component(name: str) -> Component:
    """The component ``name``, loaded on the first call.

    Raises:
        ValueError: there is no component of that name.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}; got {name!r}")
    return _component(name)


def components() -> tuple[Component, ...]:
    """All components, in the order of ``NAMES``; loads those that are not loaded yet."""
    return tuple(component(name) for name in NAMES)


@cache
def _component(name: str) -> Component:
    return load_component(name, Path(__file__).parent, torch.__version__, _package_version())


def load_component(
    name: str, folder: Path, torch_version: str, package_version: str | None
) -> Component:
    """Load a component from ``folder``, if its record fits this torch and this package.

    ``package_version`` is None for a source tree that was never built or installed.
    """
    suffix = str(get_config_var("EXT_SUFFIX")) if name == _MODULE else ".so"
    library, record_file = folder / f"_{name}{suffix}", folder / f"_{name}.json"
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"it holds {type(record).__name__}, not an object")
    except FileNotFoundError:
        found = "has no build record" if library.exists() else "is not part of this install"
        return Component(name, False, f"component {name} {found}; {REBUILD}")
    except (OSError, ValueError) as error:
        return Component(
            name, False, f"the record of component {name} cannot be read ({error}); {REBUILD}"
        )
    reason = _refusal(name, library, record, torch_version, package_version)
    if reason is None:
        try:
            if name == _MODULE:
                _import_module(f"video_attn._{name}", library)
            else:
                torch.ops.load_library(str(library))
        except (OSError, RuntimeError, ImportError) as error:
            # torch puts its own sentence before the loader's, which is the one that helps.
            reason = f"{library.name} cannot be loaded: {error.__cause__ or error}; {REBUILD}"
    return Component(name, reason is None, reason, MappingProxyType(record))


def _import_module(name: str, library: Path) -> None:
    """Imports a compiled module from its file: ``import <name>`` finds it from then on."""
    spec = spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library.name} is no module for this Python")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


def _refusal(
    name: str,
    library: Path,
    record: Mapping[str, Any],
    torch_version: str,
    package_version: str | None,
) -> str | None:
    """Why a recorded component must not be loaded here, or None."""
    if not record.get("built"):
        return f"component {name} was not built: {record.get('reason') or 'no reason recorded'}"
    if not library.is_file():
        return f"{library.name} is missing although its record is there; {REBUILD}"
    built_for = record.get("version")
    if package_version is not None and built_for != package_version:
        return (
            f"component {name} was built for video-attn {built_for}, this is {package_version}; "
            f"{REBUILD}"
        )
    # The CUDA components use torch's stable ABI; the CPU component uses ATen, which changes.
    built_with = str(record.get("torch"))
    if name == "cpu" and _minor(built_with) != _minor(torch_version):
        return (
            f"component cpu was built for torch {built_with}, this is torch {torch_version}; "
            f"{REBUILD}"
        )
    return None


def _minor(torch_version: str) -> list[str]:
    """["2", "13"] of "2.13.0+cpu": what decides whether ATen libraries fit."""
    return torch_version.split(".")[:2]


def _package_version() -> str | None:
    try:
        return version("video-attn")
    except PackageNotFoundError:
        return None
