"""Which backend runs: the order of authority, refusals in words, and the table for every chip."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import require_backend
from torch import Tensor

import video_attn
from video_attn import BlockMask, attention, block_ops, registry, use_backend
from video_attn.calls import BackwardCall, ForwardCall
from video_attn.device import DeviceInfo, device_info
from video_attn.quantize import QuantizationOptions
from video_attn.registry import (
    Backend,
    Problem,
    backends,
    explain,
    select,
    select_block_ops,
    why_not,
)

CHIPS = (
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100",
    "gfx1201",
)  # fmt: skip
CALL = "backend= or use_backend()"  # a call carries on what its context forces
OLD_CHIPS = ("sm_70", "sm_75", "gfx803")


def problem(**changes: Any) -> Problem:
    good: dict[str, Any] = {
        "direction": "forward", "device_type": "cpu", "arch": "cpu", "dtype": torch.float32,
        "head_dim": 64, "head_dim_v": 64, "q_block_size": 64, "kv_block_size": 64,
    }  # fmt: skip
    return Problem(**(good | changes))


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Only "fast" (bf16 alone, no backward) and "slow" (everything); the list notes who ran."""
    ran: list[str] = []

    def fast_supports(problem: Problem) -> str | None:
        return None if problem.dtype == torch.bfloat16 else f"dtype {problem.dtype} is not bfloat16"

    def run(name: str) -> Any:
        def forward(call: ForwardCall) -> tuple[Tensor, Tensor]:
            ran.append(name)
            out, lse = call.empty_results()
            return out.zero_(), lse.zero_()

        return forward

    def backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
        ran.append("slow backward")
        dq, dk, dv = call.empty_results()
        return dq.zero_(), dk.zero_(), dv.zero_()

    rows = (
        Backend("fast", 10, lambda: None, fast_supports, run("fast")),
        Backend("slow", 1, lambda: None, lambda problem: None, run("slow"), backward),
        Backend("absent", 20, lambda: "it was not built", lambda problem: None, run("absent")),
    )
    monkeypatch.setattr(registry, "_backends", {b.name: b for b in rows})
    registry.forget_choices()
    yield ran
    registry.forget_choices()


# -- the order of authority ------------------------------------------------------------------------


def test_priority_decides_among_those_that_can_serve(two_backends):
    assert select(problem(dtype=torch.bfloat16)).name == "fast"
    assert select(problem(dtype=torch.float16)).name == "slow"
    assert [b.name for b in backends()] == ["absent", "fast", "slow"]


def test_authority(two_backends, monkeypatch):
    """A call's own backend, then the context, then the environment, then priority."""
    bf16 = problem(dtype=torch.bfloat16)
    assert select(bf16).name == "fast"
    monkeypatch.setenv("VIDEO_ATTN_BACKEND", "slow")
    assert select(bf16).name == "slow"
    with use_backend("fast"):
        assert select(bf16).name == "fast"
        assert select(bf16, "slow").name == "slow"
        with use_backend("slow"):
            assert select(bf16).name == "slow"
        assert select(bf16).name == "fast"
    assert select(bf16).name == "slow"
    monkeypatch.setenv("VIDEO_ATTN_BACKEND", "")
    assert select(bf16).name == "fast", "an empty variable is no choice"


@pytest.mark.parametrize("source", [CALL, "use_backend()", "VIDEO_ATTN_BACKEND"])
def test_forced_backend_that_cannot_serve_raises_with_the_table(source, two_backends, monkeypatch):
    """Never another backend instead; the message says who asked, why not, and who could."""
    # The next in authority asks for "slow", which could serve.
    explicit = "fast" if source == CALL else None
    context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if source == "VIDEO_ATTN_BACKEND":
        monkeypatch.setenv(source, "fast")
    else:
        context = use_backend("fast" if source == "use_backend()" else "slow")
    with context, pytest.raises(RuntimeError) as caught:
        select(problem(), explicit)
    message = str(caught.value)
    assert f"'fast', asked for by {source}, cannot serve" in message
    assert "dtype torch.float32 is not bfloat16" in message
    assert "absent: it was not built" in message
    assert "slow: can serve" in message
    assert "head_dim=64" in message


def test_context_ends_with_an_exception(two_backends):
    with pytest.raises(KeyError), use_backend("slow"):
        raise KeyError("something else went wrong")
    assert select(problem(dtype=torch.bfloat16)).name == "fast"


def test_a_backend_without_backward_is_refused_for_it(two_backends):
    assert select(problem(dtype=torch.bfloat16, direction="backward")).name == "slow"
    with pytest.raises(RuntimeError, match="has no backward pass"):
        select(problem(dtype=torch.bfloat16, direction="backward"), "fast")


def test_forward_and_backward_may_run_on_different_backends(two_backends):
    q = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    attention(q, q, q).sum().backward()
    assert two_backends == ["fast", "slow backward"]


def test_context_around_the_forward_covers_its_backward(two_backends):
    """The forced backend belongs to the call: its backward, run later, does not choose again."""
    q = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with use_backend("fast"):
        out = attention(q, q, q)
    with pytest.raises(RuntimeError, match="'fast'.*cannot serve: has no backward pass"):
        out.sum().backward()
    assert two_backends == ["fast"]


def test_nobody_can_serve(two_backends):
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RuntimeError, match="no backend can serve") as caught,
    ):
        patch.delitem(registry._backends, "slow")
        select(problem())
    assert "absent: it was not built" in str(caught.value)
    assert "fast: dtype torch.float32 is not bfloat16" in str(caught.value)


# -- reports ---------------------------------------------------------------------------------------


def test_why_not_is_the_whole_table(two_backends):
    verdicts = [(v.backend, v.reason, v.chosen) for v in why_not(problem(dtype=torch.bfloat16))]
    assert verdicts == [
        ("absent", "it was not built", False),
        ("fast", None, True),
        ("slow", None, False),
    ]
    assert "fast: can serve" in explain(problem(dtype=torch.bfloat16))


def test_automatic_step_to_the_reference_is_said_once(caplog):
    """Nobody should find out from a profile that the slow definition runs."""
    registry.forget_choices()
    fp64 = problem(dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="video_attn"):
        assert select(fp64).name == select(fp64).name == "reference"
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1, messages
    assert "slow torch reference" in messages[0] and "cpu: dtype torch.float64" in messages[0]


def test_a_forced_reference_is_not_warned_about(caplog):
    registry.forget_choices()
    with caplog.at_level(logging.WARNING, logger="video_attn"):
        select(problem(), "reference")
    assert not caplog.records


# -- the selection is cached -----------------------------------------------------------------------


def test_selection_is_cached_by_problem(monkeypatch):
    registry.forget_choices()
    select(problem())
    before = registry._select.cache_info()
    for _ in range(5):
        assert select(problem()) is select(problem())
    after = registry._select.cache_info()
    assert after.hits - before.hits == 10 and after.misses == before.misses


def test_a_new_backend_is_seen_by_the_next_selection(two_backends):
    assert select(problem()).name == "slow"
    registry.register(
        Backend("faster", 30, lambda: None, lambda problem: None, lambda *a, **k: None)
    )
    assert select(problem()).name == "faster"


def test_problem_is_a_value():
    assert problem() == problem() and hash(problem()) == hash(problem())
    assert problem(head_dim=72) != problem()
    assert problem().is_sparse and not problem(q_block_size=None, kv_block_size=None).is_sparse
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem().head_dim = 3


# -- the real table --------------------------------------------------------------------------------


def test_the_backends_of_this_package():
    names = [b.name for b in backends()]
    assert {"cpu", "triton", "reference"} <= set(names)
    assert names[-1] == "reference", "the definition is the last choice"


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_backends_that_every_installation_has(name):
    require_backend(name)


def every_problem() -> Iterator[Problem]:
    """A grid over everything that a problem says, for chips that are not in this machine."""
    sizes = ((None, None), (64, 64), (384, 128), (100, 8))
    head_dims = ((8, 8), (72, 128), (128, 128), (256, 256))
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for arch, dtype, (d, dv), (q_size, kv_size) in itertools.product(
        (*CHIPS, *OLD_CHIPS, "cpu"), dtypes, head_dims, sizes
    ):
        for precision, direction in itertools.product(registry.PRECISIONS, ("forward", "backward")):
            device_type = "cpu" if arch == "cpu" else "cuda"
            yield Problem(
                direction, device_type, arch, dtype, d, dv, q_size, kv_size,
                is_causal=q_size is None, precision=precision,
            )  # fmt: skip


def test_supports_answers_for_every_chip_in_words():
    """None, or one sentence: never False, never an exception, never a look at this machine."""
    count = 0
    for each in every_problem():
        for backend in backends():
            reason = backend.supports(each)
            count += 1
            if reason is not None:
                assert isinstance(reason, str) and len(reason) > 5, (backend.name, each, reason)
                assert "\n" not in reason and not reason.endswith("."), (backend.name, reason)
    assert count > 10_000


def compiled_triton(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The triton backend as it judges without the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return next(b for b in backends() if b.name == "triton")


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_triton_serves_every_promised_chip(arch, direction, monkeypatch):
    """All dtypes, head dims, block sizes, causal: what the package promises for these chips."""
    triton = compiled_triton(monkeypatch)
    for each in every_problem():
        if (each.arch, each.direction, each.precision) != (arch, direction, "native"):
            continue
        reason = triton.supports(each)
        if each.dtype == torch.float64:
            assert reason is not None and "float64" in reason
        else:
            assert reason is None, f"{each}: {reason}"


@pytest.mark.parametrize("arch", OLD_CHIPS)
def test_triton_refuses_old_chips_by_name(arch, monkeypatch):
    each = problem(device_type="cuda", arch=arch, dtype=torch.float16)
    reason = compiled_triton(monkeypatch).supports(each)
    assert reason is not None and arch in reason


def test_cpu_tensors_do_not_choose_the_interpreter():
    """It runs when asked for by name only: it is a thousand times slower than any other."""
    chosen = select(problem(dtype=torch.float16))
    assert chosen.name == "cpu"


def test_refusals_name_the_value_and_the_limit():
    half_sums = QuantizationOptions(pv_accumulation="fp16+fp32")
    cases = (
        ("cpu", problem(dtype=torch.float64), "float64"),
        ("cpu", problem(device_type="cuda", arch="sm_90"), "cuda"),
        ("cpu", problem(precision="sage_fp8", direction="backward"), "sage_fp8"),
        ("cpu", problem(precision="sage_fp16", quantization=half_sums), "'fp16+fp32'"),
        ("triton", problem(dtype=torch.float64), "float64"),
        ("triton", problem(head_dim=257), "257"),
    )
    table = {b.name: b for b in backends()}
    for name, each, value in cases:
        reason = table[name].supports(each)
        assert reason is not None and value in reason, (name, reason)


def test_device_info():
    info = device_info("cpu")
    assert (info.type, info.vendor, info.arch) == ("cpu", "cpu", "cpu")
    assert info.multiprocessors == torch.get_num_threads()


@pytest.mark.gpu
def test_device_info_of_the_gpu(gpu):
    info = device_info(gpu)
    assert info == device_info("cuda")
    assert info.vendor in ("nvidia", "amd") and info.multiprocessors > 0
    assert select(problem(device_type="cuda", arch=info.arch, dtype=torch.bfloat16)).name != (
        "reference"
    )


# -- the public face -------------------------------------------------------------------------------


def test_public_names():
    for name in video_attn.__all__:
        assert getattr(video_attn, name) is not None
    assert {"attention", "BlockMask", "VideoLayout", "use_backend"} <= set(video_attn.__all__)
    assert video_attn.__version__


def test_whole_call_through_every_way_of_asking(monkeypatch):
    torch.manual_seed(0)
    q = torch.randn(1, 2, 64, 16)
    mask = BlockMask.from_dense(torch.eye(4, dtype=torch.bool)[None, None], 16, 16)
    expected = attention(q, q, q, mask, backend="reference")
    torch.testing.assert_close(attention(q, q, q, mask), expected)
    with use_backend("cpu"):
        torch.testing.assert_close(attention(q, q, q, mask), expected)
    monkeypatch.setenv("VIDEO_ATTN_BACKEND", "cpu")
    torch.testing.assert_close(attention(q, q, q, mask), expected)
    with pytest.raises(RuntimeError, match="asked for by VIDEO_ATTN_BACKEND"):
        attention(q.double(), q.double(), q.double(), mask)


# -- block means and top-k -------------------------------------------------------------------------


def test_block_means_follow_the_forced_backend(monkeypatch):
    """As attention does; a backend without block means leaves them to the best for the device."""
    gpu = DeviceInfo("cuda", "nvidia", "sm_90", "a GPU", 132)
    monkeypatch.setattr(registry, "device_info", lambda device: gpu)
    registry.forget_choices()
    rows = {backend.name: backend.block_ops for backend in backends()}
    device = torch.device("cuda", 0)
    assert select_block_ops(device) is rows["triton"]
    assert select_block_ops(device, "reference") is rows["reference"]
    with use_backend("reference"):
        assert select_block_ops(device) is rows["reference"]
        assert select_block_ops(device, "hopper") is rows["triton"]
    monkeypatch.setenv("VIDEO_ATTN_BACKEND", "reference")
    assert select_block_ops(device) is rows["reference"]
    registry.forget_choices()


def test_video_sparse_hands_its_backend_to_the_block_means(monkeypatch):
    asked = []
    select = block_ops.select_block_ops
    monkeypatch.setattr(
        block_ops, "select_block_ops", lambda device, name: asked.append(name) or select(device)
    )
    q = torch.randn(1, 1, 64, 8)
    video_attn.video_sparse(q, q, q, (4, 4, 4), top_k=1, tile=(2, 2, 2), backend="reference")
    assert asked and set(asked) == {"reference"}
