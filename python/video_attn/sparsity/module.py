"""SparseAttentionModule: what ``sparsify`` makes of an attention module, in place.

The module stays the object it is, with its parameters, hooks and names; only its class becomes a
subclass of its own class and of :class:`SparseAttentionModule`, whose ``forward`` runs the forward
it had with another attention inside.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..integrations.intercept import ReplacedProcessor, rebound
from ..layout import Triple
from .attributes import read_triple
from .state import ModuleState

_STATE = "_sparse_attention"


class SparseAttentionModule(nn.Module):
    """The base of all sparsified modules: ``isinstance(module, SparseAttentionModule)``."""

    _sparse_attention: ModuleState

    @property
    def is_enabled(self) -> bool:
        """Whether the method applies; otherwise the module does what it always did."""
        return self._sparse_attention.enabled

    def enable(self) -> None:
        """Turns the method on.

        Raises:
            ValueError: the configuration gave this module no method.
        """
        if self._sparse_attention.attributes is None:
            raise ValueError(
                f"module {self._sparse_attention.name!r} has no method to enable: give it one with "
                "set_sparse_attention_attribute(model, name, {'method': 'vsa', ...})"
            )
        self._sparse_attention.enabled = True
        _switched(self)

    def disable(self) -> None:
        """Turns the method off: dense attention, as before ``sparsify``."""
        self._sparse_attention.enabled = False
        _switched(self)

    def set_video_shape(self, video_shape: Triple | None) -> None:
        """Tokens (T, H, W) of the video from now on; None: as the configuration says.

        Raises:
            ValueError: not three positive integers.
        """
        self._sparse_attention.video_shape = (
            None if video_shape is None else read_triple(video_shape, "video_shape")
        )

    def get_threshold_info(self) -> dict[str, Any]:
        """The method's figures: type "vsa", block_size_3d, top_k_ratio, video_shape ...; a module
        without a method has type "none" and value None.
        """
        state = self._sparse_attention
        if state.attributes is None:
            return {"type": "none", "value": None}
        return {**state.attributes.info(), "video_shape": state.shape_said()}

    def get_stats(self) -> dict[str, Any]:
        """Statistics of the real masks: module, method, total_calls, average_sparsity,
        dense_calls by reason, video_shape. {} unless ``collect_stats`` is on. Reads the device.
        """
        return self._sparse_attention.stats()

    def forward_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate_compress: Tensor | None = None,
        video_shape: Triple | None = None,
    ) -> Tensor:
        """The attention of this module's method on its own.

        Args:
            query, key, value: [B, H, S, D], the video in raster order.
            gate_compress: weight of the coarse branch, [B, H, S, D]; None: as the attribute
                ``gate`` says, without a trained gate.
            video_shape: as :meth:`set_video_shape`, which it calls; None leaves it.

        Raises:
            ValueError: the video shape is not set, or does not match the tokens.
        """
        from .attend import attend_alone

        if video_shape is not None:
            self.set_video_shape(video_shape)
        return attend_alone(self._sparse_attention, query, key, value, gate_compress)

    def __reduce__(self) -> tuple[Any, ...]:
        # A processor that asks us is not copied; the copy makes its own when it first runs.
        state = dict(self.__dict__)
        processor = state.get("processor")
        if isinstance(processor, ReplacedProcessor):
            state["processor"] = processor.before
        return _new, (original_class(self),), state


@functools.cache
def _sparse_class(cls: Any) -> Any:
    # Not cls.forward below: torch.compile takes some classes of diffusers for operators.
    original, traced = cls.forward, rebound(cls.forward)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .attend import run

        return run(self, self._sparse_attention, original, args, kwargs, traced)

    body = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"Sparse{cls.__name__}", (SparseAttentionModule, cls), body)


def _new(cls: type[nn.Module]) -> SparseAttentionModule:
    kind: Any = cls
    sparse = _sparse_class(kind)
    made: SparseAttentionModule = sparse.__new__(sparse)
    return made


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a sparsified module had; its class where it is not sparsified."""
    order = type(module).__mro__
    if not isinstance(module, SparseAttentionModule):
        return order[0]
    return order[order.index(SparseAttentionModule) + 1]


def convert(module: nn.Module, state: ModuleState) -> None:
    """Makes ``module`` a :class:`SparseAttentionModule` in place; again, renews its state."""
    module.__dict__[_STATE] = state
    if not isinstance(module, SparseAttentionModule):
        before: Any = type(module)
        module.__class__ = _sparse_class(before)
        _route_instance_forward(module, before.forward, module.__class__.forward)
    _switched(module)


def revert(module: SparseAttentionModule) -> None:
    """Gives the module its class back."""
    from .attend import detach_processor
    from .structure import unwatch

    cls = original_class(module)
    kind: Any = cls
    if type(module) is not _sparse_class(kind):
        raise RuntimeError(
            f"{module._sparse_attention.name!r} is a {type(module).__name__} now: something has "
            "wrapped it since sparsify(), and must be undone first"
        )
    module.disable()
    detach_processor(module)
    unwatch(module)
    ours = type(module).forward
    module.__class__ = cls  # type: ignore[assignment]
    _route_instance_forward(module, ours, cls.forward)
    del module.__dict__[_STATE]


def _switched(module: nn.Module) -> None:
    """What must follow the switch of a module."""
    if isinstance(module, nn.MultiheadAttention):
        from .multihead import keep_from_fused_layers

        keep_from_fused_layers(module, keep=module._sparse_attention.enabled)  # type: ignore[arg-type,union-attr]


class _InstanceForward:
    """Stands before a forward that somebody put on the instance, which hides that of the class."""

    def __init__(self, module: nn.Module, inner: Any) -> None:
        self.module, self.inner = module, inner
        functools.update_wrapper(self, inner, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from .attend import run

        state: Any = self.module._sparse_attention
        return run(self.module, state, lambda _, *a, **k: self.inner(*a, **k), args, kwargs)


def _route_instance_forward(module: nn.Module, before: Any, after: Any) -> None:
    """Hooks of accelerate and diffusers keep forwards on the instance; they must lead to ours.

    accelerate binds the forward that the class had as ``_old_forward``, and puts it back as
    ``forward`` when its hook goes: that one is exchanged. Any other is wrapped.
    """
    own = module.__dict__
    for name in ("_old_forward", "forward"):
        bound = own.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is before:
            own[name] = MethodType(after, module)
            return
    if isinstance(own.get("forward"), _InstanceForward):
        own["forward"] = own["forward"].inner
    elif "forward" in own:
        own["forward"] = _InstanceForward(module, own["forward"])
