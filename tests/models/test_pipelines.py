"""What people do to pipelines, with attention applied: steps, threads, sizes.

docs/models.md has a row for each test of these files.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import MODELS, output, random
from tiny_wan import (
    CALLS,
    FIRST,
    FRAMES,
    HEIGHT,
    LAYERS,
    PATTERN,
    STEPS,
    WIDTH,
    counts,
    error,
    latents,
    tiny_transformer,
    tiny_wan,
)

from video_attn import (
    SlidingTile,
)
from video_attn.integrations import Schedule, apply, presets

pytest.importorskip("diffusers.models.attention_dispatch")


def test_pipelines_that_share_a_transformer(pipe: Any) -> None:
    """Each has its own steps: those of the pipeline that runs hold, in any order."""
    other = tiny_wan(transformer=pipe.transformer)
    with apply(pipe, PATTERN, schedule=Schedule(dense_first_steps=1, dense_last_steps=1)) as handle:
        alone = latents(pipe)
        assert counts(handle) == ((STEPS - 2) * CALLS, 2 * CALLS)
        latents(other, num_inference_steps=7)
        assert counts(handle) == ((STEPS - 2 + 5) * CALLS, 4 * CALLS)
        assert torch.equal(latents(pipe), alone)


def test_threads_that_share_a_transformer(pipe: Any) -> None:
    """Two sizes at once, steps in each other's way: each video is the one that it is alone."""
    sizes = [{"height": 64, "width": 96}, {"height": 96, "width": 64, "num_inference_steps": 3}]
    pipes = [pipe, tiny_wan(transformer=pipe.transformer)]
    with apply(pipe, PATTERN, schedule=FIRST):
        alone = [latents(p, **size) for p, size in zip(pipes, sizes, strict=True)]
        together: list[Any] = [None, None]

        def run(index: int) -> None:
            together[index] = [latents(pipes[index], **sizes[index]) for _ in range(3)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for expected, got in zip(alone, together, strict=True):
        assert all(torch.equal(video, expected) for video in got)


def test_a_scheduler_that_calls_twice_per_step() -> None:
    """Heun: 4 steps are 7 calls of the transformer at 4 timesteps."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = tiny_wan(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0))
    schedule = Schedule(dense_first_steps=1, dense_last_steps=1)
    with apply(pipe, PATTERN, schedule=schedule) as handle:
        latents(pipe)
    first_and_last = 1 + 1  # the first timestep is called once more in the second half of its step
    calls = (2 * STEPS - 1) * CALLS
    assert sum(counts(handle)) == calls
    assert handle.dense_calls in (first_and_last * CALLS, (first_and_last + 1) * CALLS)
    assert handle.dense_calls > CALLS


def test_video_to_video_counts_the_steps_that_are_run() -> None:
    pipe = tiny_wan("WanVideoToVideoPipeline")
    video = [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * FRAMES
    with apply(pipe, PATTERN, schedule=FIRST) as handle:
        from PIL import Image

        latents(
            pipe, video=[Image.fromarray(x) for x in video], strength=0.5, num_frames=None,
            num_inference_steps=6,
        )  # fmt: skip
    assert counts(handle) == (2 * CALLS, CALLS)


def test_image_to_video_with_timesteps_per_token() -> None:
    """Wan 2.2 TI2V: the tokens of the image have timestep 0, all others that of the step."""
    from PIL import Image

    pipe = tiny_wan("WanImageToVideoPipeline", tiny_transformer(), expand_timesteps=True)
    image = Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    dense = latents(pipe, image=image)
    schedule = Schedule(dense_first_steps=1, dense_last_steps=1)
    with apply(pipe, PATTERN, schedule=schedule) as handle:
        sparse = latents(pipe, image=image)
    assert counts(handle) == ((STEPS - 2) * CALLS, 2 * CALLS)
    assert error(sparse, dense) > 1e-3
    with apply(pipe, SlidingTile((9, 9, 9), PATTERN.tile), schedule=schedule):
        assert error(latents(pipe, image=image), dense) < 1e-4


def test_few_steps_that_are_all_dense_say_so(pipe: Any) -> None:
    schedule = Schedule(dense_first_steps=12)
    with apply(pipe, PATTERN, schedule=schedule) as handle:
        with pytest.warns(UserWarning, match=f"all {STEPS} steps of this run are dense"):
            latents(pipe)
        assert handle.sparse_calls == 0
    with apply(pipe, **(presets.wan_few_steps() | {"pattern": PATTERN})) as handle:
        latents(pipe)
    assert counts(handle) == ((STEPS - 1) * CALLS, CALLS)


def test_a_transformer_alone_is_told_the_timesteps() -> None:
    model, inputs = tiny_transformer(), MODELS["wan"].inputs(1)
    inputs["hidden_states"] = random(1, 16, 3, 8, 12)
    with apply(model, PATTERN, schedule=FIRST, timesteps=[900, 500, 100]) as handle:
        output(model, inputs)  # timestep 500
        assert counts(handle) == (LAYERS, 0)
        output(model, inputs | {"timestep": torch.tensor([900.0])})
        assert counts(handle) == (LAYERS, LAYERS)
    with apply(model, PATTERN, schedule=FIRST), pytest.raises(ValueError, match="give timesteps="):
        output(model, inputs)


def test_an_interrupt_leaves_nothing_behind(pipe: Any) -> None:
    with apply(pipe, PATTERN, schedule=FIRST) as handle:
        expected = latents(pipe)

        def stop(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            pipe._interrupt = step == 1
            return tensors

        before = sum(counts(handle))
        latents(pipe, callback_on_step_end=stop)
        assert sum(counts(handle)) - before == 2 * CALLS

        def fail(*_: Any) -> Any:
            raise ZeroDivisionError

        failing = pipe.transformer.proj_out.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            latents(pipe)
        failing.remove()
        attention = pipe.transformer.blocks[0].attn1
        with pytest.raises(RuntimeError, match="outside of the forward of its transformer"):
            attention(random(1, 72, 24))
        assert torch.equal(latents(pipe), expected)


def test_another_size_and_a_batch_follow(pipe: Any) -> None:
    """A second resolution, more frames, two prompts with guidance; each is the definition's."""
    everything = SlidingTile((9, 9, 9), (2, 2, 2))
    for options in (
        {"height": 96, "width": 64},
        {"num_frames": 13},
        {"prompt_embeds": random(2, 6, 16), "negative_prompt_embeds": torch.zeros(2, 6, 16)},
    ):
        dense = latents(pipe, **options)
        with apply(pipe, PATTERN):
            latents(pipe)
            assert error(latents(pipe, **options), dense) > 1e-3
        with apply(pipe, everything):
            latents(pipe)
            assert error(latents(pipe, **options), dense) < 1e-4
