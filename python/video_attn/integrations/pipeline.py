"""apply(pipe, ...): radial attention in a diffusers pipeline, and the handle that takes it out.

Everything hangs on the one pipeline: its attention modules get processors of their own, and its
transformer a hook that tells them, before each forward pass, which mask holds in this step. No
class is touched, so pipelines in one process do not know of each other.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..block_mask import BlockMask
from ..calls import problem_of
from ..patterns.radial import RadialRule
from ..patterns.scene import Scenes
from ..quantize import parse_recipe
from ..registry import PRECISIONS, check_backend_name, select
from . import cogvideox
from .plan import MaskPlan
from .schedule import Choice, Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# What is known of each transformer: MODEL_TYPE, Processor, attention_modules, layout_of,
# layout_of_call, fit_scenes.
MODELS: dict[str, ModuleType] = {cogvideox.TRANSFORMER: cogvideox}
_HANDLE = "_video_attn_applied"


def apply(
    pipe: DiffusionPipeline,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    rule: Choice | None = None,
    block_size: int = 128,
    scenes: Scenes | None = None,
    schedule: Schedule | None = None,
    precision: str = "native",
    backend: str | None = None,
    fuse_qkv: bool = False,
) -> AppliedAttention:
    """Gives the video self-attention of ``pipe`` a radial block mask. Works in place, at once.

    ::

        with apply(pipe, num_frames=49, schedule=Schedule(dense_layers=2, dense_first_steps=5)):
            video = pipe(prompt, num_frames=49).frames[0]

    Args:
        pipe: a diffusers pipeline with a CogVideoX transformer.
        height, width, num_frames: of the videos to come, in pixels; None takes what the pipeline
            takes by default. A generation of another size raises.
        rule: default the published rule of the model; "dense" for no sparsity at all.
        block_size: tokens of a mask block.
        scenes: which scenes may see each other; how its pixel frames meet the model's latent
            frames is filled in.
        schedule: which layers and steps stay dense; default none.
        precision, backend: as in :func:`video_attn.attention`. Dense layers and steps run in this
            precision and backend too; with the defaults they are the pipeline's own, untouched.
        fuse_qkv: project q, k and v by one matrix.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
        RuntimeError: the pipeline carries an application already; undo that first.
    """
    model, transformer = _model_of(pipe)
    if applied_to(pipe) is not None:
        raise RuntimeError("pipe has an attention applied already: call undo() on its handle first")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if backend is not None:
        check_backend_name(backend)
    if not isinstance(fuse_qkv, bool):
        raise TypeError(f"fuse_qkv must be True or False, got {fuse_qkv!r}")
    plan = MaskPlan(
        model.layout_of(pipe, height, width, num_frames),
        RadialRule.for_model(model.MODEL_TYPE) if rule is None else rule,
        block_size,
        None if scenes is None else model.fit_scenes(pipe, num_frames, scenes),
        Schedule() if schedule is None else schedule,
        layers=len(model.attention_modules(transformer)),
        heads=transformer.config.num_attention_heads,
    )
    return AppliedAttention(pipe, plan, precision, backend, fuse_qkv)


def applied_to(pipe: DiffusionPipeline) -> AppliedAttention | None:
    """The application that ``pipe`` carries, or None."""
    return getattr(_model_of(pipe)[1], _HANDLE, None)


class AppliedAttention:
    """What :func:`apply` did to a pipeline: its figures, and ``undo()``. A context manager.

    Attributes:
        plan: layout, rule, scenes, schedule, and the masks that follow from them.
        precision, backend: as given.
        sparse_calls, dense_calls: attention calls of the transformer until now.
    """

    def __init__(
        self,
        pipe: Any,
        plan: MaskPlan,
        precision: str,
        backend: str | None,
        fuse_qkv: bool,
    ) -> None:
        self.plan = plan
        self.precision = precision
        self.backend = backend
        self.sparse_calls = self.dense_calls = 0
        self._pipe = pipe
        self._model, self._transformer = _model_of(pipe)
        self._masks: dict[torch.device, list[BlockMask | None]] = {}
        self._modules: list[Any] = self._model.attention_modules(self._transformer)
        self._fused = fuse_qkv and _fuse(self._transformer, self._modules)
        self._before = [module.processor for module in self._modules]
        self._processors = [
            self._model.Processor(inner=inner, precision=precision, backend=backend)
            for inner in self._before
        ]
        for module, processor in zip(self._modules, self._processors, strict=True):
            module.set_processor(processor)
        # Not traced by torch.compile: it sets what the compiled code is guarded on.
        self._hook = self._transformer.register_forward_pre_hook(
            torch.compiler.disable(self._before_forward), with_kwargs=True
        )
        setattr(self._transformer, _HANDLE, self)

    def undo(self) -> None:
        """Puts the pipeline back as it was. A second call does nothing."""
        if getattr(self._transformer, _HANDLE, None) is not self:
            return
        delattr(self._transformer, _HANDLE)
        self._hook.remove()
        for module, ours, before in zip(self._modules, self._processors, self._before, strict=True):
            if module.processor is ours:
                module.set_processor(before)
        if self._fused:
            _unfuse(self._transformer, self._modules)

    def __enter__(self) -> AppliedAttention:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def backend_name(self, *, sparse: bool = True) -> str:
        """The backend that runs the sparse calls, or the dense ones, of this pipeline as it is.

        Raises:
            RuntimeError: none can; the message says why for each.
        """
        if not sparse and self.precision == "native" and self.backend is None:
            return "the pipeline's own"
        masks = self.plan.layer_masks("cpu")
        mask = next((mask for mask in masks if mask is not None), None) if sparse else None
        if sparse and mask is None:
            return "none: no layer is sparse"
        precision, quantization = parse_recipe(self.precision)
        head_dim = self._transformer.config.attention_head_dim
        like = torch.empty(
            1, 1, 0, head_dim,
            dtype=self._transformer.dtype, device=self._pipe._execution_device,
        )  # fmt: skip
        problem = problem_of(
            "forward", like, like, like, mask, precision=precision, quantization=quantization
        )
        return select(problem, self.backend).name

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook: checks the size of this call and gives each layer its mask for this step."""
        inputs = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        self._check_size(inputs)
        masks: list[BlockMask | None] = [None] * len(self._processors)
        if not self._is_dense_step(inputs["timestep"]):
            device = inputs["hidden_states"].device
            if device not in self._masks:
                self._masks[device] = self.plan.layer_masks(device)
            masks = self._masks[device]
        for index, (attention, processor) in enumerate(
            zip(self._modules, self._processors, strict=True)
        ):
            if attention.processor is not processor:
                raise RuntimeError(
                    f"the attention processor of layer {index} was replaced after apply(): call "
                    "undo() first, change the processors, and apply again"
                )
            processor.mask = masks[index]
        sparse = sum(mask is not None for mask in masks)
        self.sparse_calls += sparse
        self.dense_calls += len(masks) - sparse

    def _check_size(self, inputs: dict[str, Any]) -> None:
        given = self._model.layout_of_call(self._transformer, inputs)
        if given != self.plan.layout:
            raise ValueError(
                f"this call has {_describe(given)}, but attention was applied for "
                f"{_describe(self.plan.layout)}; apply again with the height, width and "
                "num_frames of this generation"
            )

    def _is_dense_step(self, timestep: Tensor | float) -> bool:
        schedule = self.plan.schedule
        if not schedule.needs_step:
            return False
        return schedule.is_dense_step(*denoising_step(self._pipe.scheduler, timestep))


def denoising_step(scheduler: Any, timestep: Tensor | float) -> tuple[int, int]:
    """(index of the denoising step, number of steps) of a transformer call with ``timestep``.

    The index is the place of ``timestep`` in ``scheduler.timesteps``, so it needs no counter that
    could lose count. It reads one number back from the device, once per step. A video-to-video run
    that skips the first timesteps starts at a later index.

    Raises:
        ValueError: ``timestep`` is not one of the scheduler's.
    """
    timesteps = scheduler.timesteps.tolist()
    now = float(torch.as_tensor(timestep).flatten()[0])
    step = min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - now))
    if abs(timesteps[step] - now) > 2**-8 * abs(now):  # a pipeline may pass it in bf16
        raise ValueError(
            f"timestep {now} is none of the scheduler's {len(timesteps)} timesteps, from "
            f"{timesteps[0]} to {timesteps[-1]}, so the schedule cannot tell the step"
        )
    return step, len(timesteps)


def _model_of(pipe: Any) -> tuple[ModuleType, Any]:
    transformer = getattr(pipe, "transformer", None)
    transformer = getattr(transformer, "_orig_mod", transformer)  # inside a torch.compile wrapper
    for kind in type(transformer).__mro__:
        if kind.__name__ in MODELS:
            return MODELS[kind.__name__], transformer
    raise TypeError(
        f"pipe must be a diffusers pipeline whose transformer is a {' or '.join(MODELS)}, got "
        f"{type(pipe).__name__} with {type(transformer).__name__}"
    )


def _fuse(transformer: Any, modules: list[Any]) -> bool:
    """Fuses the projections of q, k and v; False when they were fused already."""
    if any(getattr(module, "fused_projections", False) for module in modules):
        return False
    transformer.fuse_qkv_projections()
    return True


def _unfuse(transformer: Any, modules: list[Any]) -> None:
    transformer.unfuse_qkv_projections()  # puts the processors back, but keeps the weights twice
    for module in modules:
        del module.to_qkv
        module.fused_projections = False


def _describe(layout: Any) -> str:
    frames, rows, columns = layout.grid
    return (
        f"{layout.sequence_length} tokens ({layout.text_length} text and {frames} x {rows} x "
        f"{columns} video)"
    )
