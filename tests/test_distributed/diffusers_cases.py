"""diffusers' context parallelism on ranks: what several give is what one gives; run by the pool."""

from __future__ import annotations

from typing import Any

import tiny_pipelines
import tiny_wan
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from tiny_models import MODELS, output, random
from tiny_wan import tiny_transformer
from torch.distributed.device_mesh import DeviceMesh

from video_attn import Radial, SlidingTile, VideoSparse
from video_attn.functional.head_groups import HeadGroup, HeadGroups
from video_attn.integrations import Schedule, apply

MASKS = {"encoder_attention_mask", "audio_encoder_attention_mask"}
DEGREES: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_degree": 4},  # of two heads: two ranks have none
    "ring": {"ring_degree": 4},
    "usp": {"ring_degree": 2, "ulysses_degree": 2},
    "two times two": {"ulysses_degree": 2},  # two groups that know nothing of each other
}
PATTERNS = {
    "sliding": SlidingTile((1, 1, 2), (2, 2, 2)),
    "sliding_per_head": SlidingTile([(1, 1, 2), (2, 2, 1)], (2, 2, 2)),
    "selected": VideoSparse(top_k=2, tile=(2, 2, 2), gate=None),
    "groups": HeadGroups(
        [
            HeadGroup([1], SlidingTile((1, 1, 2), (2, 2, 2))),
            HeadGroup([0], Radial(block_size=8)),
        ]
    ),
    "radial": Radial(block_size=8),
}


def parallel(model: Any, degrees: str, plan: dict[str, Any] | None = None) -> None:
    torch.accelerator.device_count = lambda: 1  # diffusers asks before it looks at the CPU
    options = dict(DEGREES[degrees])
    if degrees == "two times two":
        names = ("data", "ring", "ulysses")
        options["mesh"] = DeviceMesh("cpu", [[[0, 1]], [[2, 3]]], mesh_dim_names=names)
    model.enable_parallelism(config=ContextParallelConfig(**options), cp_plan=plan)


def wan(group: Any, degrees: str, pattern: str) -> None:
    """48 tokens of Wan, parallel after apply()."""
    inputs = {
        "hidden_states": random(1, 16, 3, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": random(1, 6, 16),
    }
    model = tiny_transformer()
    with apply(model, PATTERNS[pattern]) as handle:
        alone = output(model, inputs)
        parallel(model, degrees)
        torch.testing.assert_close(output(model, inputs), alone, rtol=1e-4, atol=1e-5)
        assert (handle.sparse_calls, handle.dense_calls) == (4, 0), handle
    dist.barrier()


def wan_pipeline(group: Any, pattern: str) -> None:
    """A whole run of two ranks, guidance and scheduler included."""
    pipe = tiny_wan.tiny_wan()
    with apply(pipe, PATTERNS[pattern]) as handle:
        alone = tiny_wan.latents(pipe)
        parallel(pipe.transformer, "two times two")
        torch.testing.assert_close(tiny_wan.latents(pipe), alone, rtol=1e-3, atol=1e-4)
        calls = tiny_wan.STEPS * tiny_wan.CALLS
        assert tiny_wan.counts(handle) == (2 * calls, 0), handle
    dist.barrier()


def ltx2_pipeline(group: Any) -> None:
    """The same, without the masks of texts that fill their length: diffusers' own attention to text
    does not cut them by heads.
    """

    def without_masks(model: Any, args: Any, inputs: dict[str, Any]) -> Any:
        return args, inputs | dict.fromkeys(inputs.keys() & MASKS)

    pipe, options = tiny_pipelines.PIPELINES["ltx2"][0]()
    for name in ("prompt", "negative_prompt"):  # diffusers cuts the text too, evenly
        options[f"{name}_embeds"] = random(2, 8, 16)
        options[f"{name}_attention_mask"] = torch.ones(2, 8)
    transformer = pipe.transformer
    transformer.register_forward_pre_hook(without_masks, with_kwargs=True)
    plan = transformer._cp_plan | {"cross_attn_rope": transformer._cp_plan["rope"]}
    with apply(pipe, PATTERNS["sliding"]) as handle:
        alone = tiny_pipelines.latents(pipe, options, 2)
        once = handle.sparse_calls
        parallel(transformer, "two times two", plan)
        got = tiny_pipelines.latents(pipe, options, 2)
        torch.testing.assert_close(got, alone, rtol=1e-3, atol=1e-4)
        assert once > 0 and handle.sparse_calls == 2 * once, handle
    dist.barrier()


def ltx2(group: Any, pattern: str) -> None:
    """60 tokens of LTX-2 with sound; diffusers' plan forgets the positions between the two."""
    tiny = MODELS["ltx2"]
    inputs = tiny.inputs(1) | {"encoder_attention_mask": None, "audio_encoder_attention_mask": None}
    inputs["encoder_hidden_states"] = random(1, 8, 16)  # diffusers cuts the text too, evenly
    inputs["audio_encoder_hidden_states"] = random(1, 8, 16)
    model = tiny.model()
    plan = model._cp_plan | {"cross_attn_rope": model._cp_plan["rope"]}
    with apply(model, PATTERNS[pattern]) as handle:
        alone = output(model, inputs)
        parallel(model, "two times two", plan)
        torch.testing.assert_close(output(model, inputs), alone, rtol=1e-4, atol=1e-5)
        assert (handle.sparse_calls, handle.dense_calls) == (4, 0), handle
    dist.barrier()


def dense_layers(group: Any) -> None:
    """Dense layers stay diffusers' own."""
    inputs = {
        "hidden_states": random(1, 16, 3, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": random(1, 6, 16),
    }
    model = tiny_transformer()
    schedule = Schedule(dense_layers=1)
    with apply(model, PATTERNS["sliding"], schedule=schedule) as handle:
        alone = output(model, inputs)
        parallel(model, "two times two")
        torch.testing.assert_close(output(model, inputs), alone, rtol=1e-4, atol=1e-5)
        assert (handle.sparse_calls, handle.dense_calls) == (2, 2), handle
    dist.barrier()
