"""``to_gate_compress``: the trained weight of VSA's coarse branch.

A gate is a linear layer of the normed hidden states, without activation:
``out = sparse + to_gate_compress(x) * coarse``, elementwise. It stands on the attention module, or
on the block around it, as in the FastWan checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.steps import TRANSFORMERS
from .matching import Pattern, matches
from .module import SparseAttentionModule
from .structure import projections

GATE = "to_gate_compress"
_KEY = re.compile(rf"^(?P<owner>.*?)\.?{GATE}\.(?P<part>weight|bias)$")
# Words that checkpoints put before the names of the transformer.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.")


def gate_width(module: nn.Module) -> tuple[int, int] | None:
    """(features in, features out) that a gate of this attention module must have: out is all heads
    together. None where the projections do not tell.
    """
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    parts = projections(module)
    if parts is None:
        return None
    query = getattr(parts.query, "base_layer", parts.query)
    features = getattr(query, "in_features", None), getattr(query, "out_features", None)
    if None in features:
        return None
    if parts.query is parts.value:  # q, k and v by one matrix; heads of k and v may be fewer
        out = _output_features(module)
        return None if out is None else (features[0], out)  # type: ignore[return-value]
    return features  # type: ignore[return-value]


def _output_features(module: nn.Module) -> int | None:
    """What the output projection takes: all heads together."""
    for name in ("to_out", "out_proj", "o_proj", "proj", "wo", "c_proj"):
        out: Any = getattr(module, name, None)
        out = out[0] if isinstance(out, (nn.ModuleList, nn.Sequential)) and len(out) else out
        if hasattr(out, "in_features"):
            return int(out.in_features)
    return None


def find_gate_owner(module: nn.Module, block: nn.Module | None) -> nn.Module | None:
    """The module that holds the gate: the attention module, else its block; None without one.

    LTX-2.3 keeps the weight of another thing, one number per head, under the same name: the width
    tells them apart.
    """
    width = gate_width(module)
    for owner in (module, block):
        gate = getattr(owner, GATE, None)
        if not isinstance(gate, nn.Module):
            continue
        out = getattr(getattr(gate, "base_layer", gate), "out_features", None)
        if width is None or out == width[1]:
            return owner
    return None


def add_gates(model: Any, pattern: Pattern = "*") -> list[str]:
    """Gives the modules with method "vsa" a trainable gate, zero at first: nothing changes yet.

    It is the only thing here that adds parameters. Modules that have a gate keep it.

    Args:
        model: sparsified before.
        pattern: which modules, as in the configuration.

    Returns:
        The names of the modules that got one.

    Raises:
        ValueError: ``model`` is not sparsified, or the projections of a module do not say how wide
            its gate must be.
    """
    added = []
    for name, module in _modules_for_gates(model):
        if not matches(pattern, name) or module._sparse_attention.gate_owner is not None:
            continue
        width = gate_width(module)
        if width is None:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) has no projections that say how wide "
                f"its gate must be; give it a linear layer {GATE!r} of your own before sparsify()"
            )
        _make_gate(module, width)
        added.append(name)
    return added


def load_gates(
    model: Any,
    checkpoint: Mapping[str, Tensor] | str | Path,
    *,
    score_dtype: str | None = "bfloat16",
) -> list[str]:
    """Takes the gates out of a checkpoint: a state dict, or a safetensors file or folder of them.

    ``blocks.3.to_gate_compress.weight`` (FastWan) and ``blocks.3.attn1.to_gate_compress.weight``
    both find the attention of block 3; what a checkpoint puts before the names is left out.

    Args:
        model: sparsified before; its modules get the gates they lack.
        checkpoint: anything else in it is not looked at. Never unpickled.
        score_dtype: set on these modules, for FastVideo's kernels choose by scores in bfloat16, so
            a model that was trained with them expects that; None leaves it.

    Returns:
        The names of the modules that got one.

    Raises:
        ValueError: there are no gates in the checkpoint, or one that fits no module or whose shape
            is wrong; nothing is changed then.
    """
    modules = dict(_modules_for_gates(model))
    plan = []
    for owner, parts in _gate_tensors(checkpoint).items():
        name = _module_of(owner, modules)
        if _is_gate(f"{owner}.{GATE}", parts, modules[name]):
            plan.append((name, parts))
    if not plan:
        raise ValueError(f"the checkpoint has no {GATE!r}: it was not trained with gates")
    for name, parts in plan:
        module = modules[name]
        state = module._sparse_attention
        if state.gate_owner is None:
            weight = parts["weight"]
            _make_gate(module, (weight.shape[1], weight.shape[0]), bias="bias" in parts)
        gate = getattr(state.gate_owner, GATE)
        with torch.no_grad():
            for part, values in parts.items():
                getattr(gate, part).copy_(values)
        if score_dtype is not None:
            state.override({"score_dtype": score_dtype})
    return [name for name, _ in plan]


def _is_gate(name: str, parts: Mapping[str, Tensor], module: SparseAttentionModule) -> bool:
    """Whether these are the tensors of a gate of ``module``; False for what LTX-2.3 keeps under the
    name.

    Raises:
        ValueError: they are neither.
    """
    shapes = {part: tuple(x.shape) for part, x in parts.items()}
    weight, width = shapes.get("weight", ()), gate_width(module)
    if width is None and len(weight) == 2:
        width = weight[1], weight[0]
    if width is not None and weight[1:] == width[:1] and weight[0] != width[1]:
        return False  # of the same inputs, one number per head
    owner = module._sparse_attention.gate_owner
    known = {"weight", "bias"} if owner is None else dict(getattr(owner, GATE).named_parameters())
    wanted = {"weight": width and width[::-1], "bias": width and width[1:]}
    if "weight" not in shapes or any(p not in known or shapes[p] != wanted[p] for p in shapes):
        raise ValueError(f"{name} must be a linear layer of {wanted}, got {shapes}")
    return True


def gate_tensors(model: Any) -> dict[str, Tensor]:
    """The gates of a sparsified model, by the name of their attention module."""
    found: dict[str, Tensor] = {}
    for name, module in _modules_for_gates(model):
        owner = module._sparse_attention.gate_owner
        if owner is not None:
            gate = getattr(owner, GATE)
            found |= {f"{name}.{GATE}.{part}": x.detach() for part, x in gate.named_parameters()}
    return found


def _modules_for_gates(model: Any) -> list[tuple[str, SparseAttentionModule]]:
    from .conversion import get_named_sparse_attention_modules

    modules = get_named_sparse_attention_modules(model)
    if not modules:
        raise ValueError("model is not sparsified: call sparsify(model, config) first")
    return [
        (name, module)
        for name, module in modules
        if module._sparse_attention.other_role is None
        and module._sparse_attention.attributes is not None
        and module._sparse_attention.attributes.method == "vsa"
    ]


def _make_gate(module: SparseAttentionModule, width: tuple[int, int], bias: bool = True) -> None:
    like = _projection_weight(module)
    gate = nn.Linear(*width, bias=bias, device=like.device, dtype=like.dtype)
    for parameter in gate.parameters():
        nn.init.zeros_(parameter)
    gate.train(module.training)
    module.add_module(GATE, gate)
    module._sparse_attention.gate_owner = module
    module._sparse_attention.added_gate = True


def _projection_weight(module: nn.Module) -> Tensor:
    """What says the device and dtype of a gate; norms may be kept in another dtype."""
    parts = projections(module)
    query = None if parts is None else getattr(parts.query, "base_layer", parts.query)
    weight = getattr(query, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    return next(x for x in module.parameters() if x.is_floating_point())


def _module_of(owner: str, modules: Mapping[str, SparseAttentionModule]) -> str:
    """The attention module whose gate stands on ``owner``: itself, or in that block."""
    names = [owner, *(owner.removeprefix(p) for p in _PREFIXES if owner.startswith(p))]
    for name in names:
        for known in modules:
            part, _, below = known.partition(".")
            bare = below if part in TRANSFORMERS else known  # of a pipeline
            if name in (known, bare) or name in (_block_of(known), _block_of(bare)):
                return known
    raise ValueError(
        f"the checkpoint has a gate on {owner!r}, which is no attention module with method 'vsa' "
        f"here; those are {', '.join(list(modules)[:4])} ..."
    )


def _block_of(name: str) -> str:
    return name.rpartition(".")[0]


def _gate_tensors(
    checkpoint: Mapping[str, Tensor] | str | Path,
) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}

    def take(key: str, value: Any) -> None:
        match = _KEY.match(key)
        if match:
            found.setdefault(match["owner"], {})[match["part"]] = value

    if isinstance(checkpoint, Mapping):
        for key, value in checkpoint.items():
            take(key, value)
        return found
    from safetensors import safe_open

    path = Path(checkpoint)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"there is no safetensors file in {path}")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  it is no dict
                if _KEY.match(key):
                    take(key, opened.get_tensor(key))
    return found
