"""The configuration of :func:`video_attn.sparsity.sparsify`: names of modules, and what they get.

A configuration is ``{"sparse_cfg": {pattern: attributes, ...}}``. A pattern is a wildcard on the
dotted name of a module (``"*.attn1"``) or a callable ``name -> bool``. The attributes under
``"default"`` go to all attention modules first, wherever it stands; then the patterns follow in
their order, and **a later match overrides only the keys it gives**. A match that names a method
turns it on, unless it says ``"enable": False``. Modules that nothing enables stay dense. A
``method`` that differs from the one before it keeps what all methods share (``video_shape``,
``precision``, ``schedule``, ...) and starts afresh with what is its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from .attributes import DEFAULT_METHOD, METHODS, AttentionAttributes

Pattern = str | Callable[[str], bool]
DEFAULT = "default"


_SHARED = frozenset(AttentionAttributes.model_fields)
_ONE_OF = {"top_k": "top_k_ratio", "top_k_ratio": "top_k"}


class SparseAttentionConfig(BaseModel):
    """``{"sparse_cfg": {pattern: attributes, ..., "default": attributes}}``, checked whole.

    Attributes:
        sparse_cfg: as in the module's description. Attributes are a dict, or one of the models of
            this module, whose keys that were set count as given.

    Raises:
        pydantic.ValidationError (a ValueError): an unknown key, or a value that is not allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    sparse_cfg: dict[Any, Any]

    @field_validator("sparse_cfg", mode="before")
    @classmethod
    def _read(cls, value: object) -> dict[Pattern, dict[str, Any]]:
        if not isinstance(value, Mapping):
            raise ValueError(f"sparse_cfg must map patterns to attributes, got {value!r}")
        read = {}
        for pattern, attributes in value.items():
            if pattern == "calibration":
                raise ValueError("'calibration' is no pattern: none of the methods needs it")
            if not isinstance(pattern, str) and not callable(pattern):
                raise ValueError(
                    f"a pattern must be a wildcard or a callable name -> bool, got {pattern!r}"
                )
            read[pattern] = given_attributes(attributes, f"sparse_cfg[{pattern!r}]")
        return read

    def attributes_of(
        self, matches: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], AttentionAttributes | None]:
        """What a module gets whose patterns gave ``matches``, in order: see :func:`merged`."""
        given: dict[str, Any] = dict(self.sparse_cfg.get(DEFAULT, {}))
        for match in matches:
            given = merged(given, match)
        return given, resolved(given)


VSA_DEFAULT: dict[str, Any] = {
    "sparse_cfg": {
        "*attn*": {
            "method": "vsa",
            "block_size_3d": (4, 4, 4),
            "top_k_ratio": 0.5,
            "enable": True,
        },
        "default": {"enable": False},
    },
}


class VSAConfig(SparseAttentionConfig):
    """The default configuration: video sparse attention in all modules named ``*attn*``."""

    sparse_cfg: dict[Any, Any] = Field(
        default_factory=lambda: copy.deepcopy(VSA_DEFAULT["sparse_cfg"]), validate_default=True
    )


def read_config(config: object) -> SparseAttentionConfig:
    """The configuration as a checked model.

    Raises:
        TypeError: neither a mapping nor a :class:`SparseAttentionConfig`. ValueError: see there.
    """
    if isinstance(config, SparseAttentionConfig):
        return config
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config must be a dict with 'sparse_cfg' or a SparseAttentionConfig, got {config!r}"
        )
    return SparseAttentionConfig.model_validate(dict(config))


def given_attributes(attributes: object, name: str = "attributes") -> dict[str, Any]:
    """The keys that ``attributes`` gives, each with a value that some method allows.

    Raises:
        ValueError: an unknown method or key, or a value that is not allowed; names it.
    """
    if isinstance(attributes, AttentionAttributes):
        return {key: getattr(attributes, key) for key in attributes.model_fields_set} | {
            "method": attributes.method
        }
    if not isinstance(attributes, Mapping):
        raise ValueError(f"{name} must be a dict of attributes, got {attributes!r}")
    given = dict(attributes)
    if "method" in given:
        _class_of(given["method"], name).model_validate(given)
        return given
    kinds = [kind for kind in METHODS.values() if set(given) <= set(kind.model_fields)]
    if not kinds:
        known = sorted({key for kind in METHODS.values() for key in kind.model_fields})
        unknown = sorted(map(str, set(given) - set(known)))
        problem = f"unknown {', '.join(unknown)}" if unknown else "keys of different methods"
        raise ValueError(f"{name}: {problem} in {given!r}; the attributes are {', '.join(known)}")
    errors = [error for kind in kinds if (error := _error_of(kind, given)) is not None]
    if len(errors) == len(kinds):
        raise errors[0]
    return given


def merged(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``before`` with the keys of ``given`` over it.

    A method that is named is on, unless ``enable`` is given with it. Another method drops the keys
    that were the former method's own; of ``top_k`` and ``top_k_ratio`` the later one counts.
    """
    kept = dict(before)
    if "method" in given:
        kept.pop("enable", None)
    method = given.get("method")
    if method is not None and method != before.get("method", method):
        kept = {key: value for key, value in before.items() if key in _SHARED}
    for key in given:
        if given[key] is not None:
            kept.pop(_ONE_OF.get(key, ""), None)
    return {**kept, **given}


def resolved(given: Mapping[str, Any]) -> AttentionAttributes | None:
    """The attributes that ``given`` keys make, with defaults; None where no method was asked for.

    A module that is only disabled (or not mentioned) has no method.

    Raises:
        ValueError: keys that do not go together.
    """
    if "method" not in given and (not given or given.get("enable") is False):
        return None
    return _class_of(given.get("method", DEFAULT_METHOD), "attributes").model_validate(dict(given))


def _class_of(method: object, name: str) -> type[AttentionAttributes]:
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"{name}: method must be one of {', '.join(METHODS)}; got {method!r}")
    return METHODS[method]


def _error_of(kind: type[AttentionAttributes], given: dict[str, Any]) -> ValidationError | None:
    try:
        kind.model_validate(given)
    except ValidationError as error:
        return error
    return None
