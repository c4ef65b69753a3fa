"""``video-attn check``: right installs pass, and a backend that is wrong anywhere does not."""

from __future__ import annotations

import itertools

import pytest
import torch

from video_attn import cli, native, registry
from video_attn.registry import PRECISIONS, Backend, Problem
from video_attn.tools.check import command, problems, run


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["check", "--device", "cpu", *words])
    return code, capsys.readouterr().out


@pytest.mark.skipif(not native.component("cpu").loaded, reason="component cpu is not built")
def test_this_install_is_right(capsys):
    code, text = check(capsys)
    assert code == 0, text
    assert "38 of 38 right on cpu" in text
    for word in ("dense", "causal", "radial", "lists of 64", "sage_fp8", "backward", "dq"):
        assert word in text
    assert "hopper is not here: " in text  # what was not checked, and why
    code, text = check(capsys, "--quick")
    assert code == 0 and "18 of 18 right" in text


def broken(part: str) -> Backend:
    """The reference's results with one fault."""
    reference = next(b for b in registry.backends() if b.name == "reference")

    def forward(call):
        out, lse = reference.forward(call)
        if part == "out" and call.mask is not None:
            out[..., -1, :] *= 1.5  # the last row of a sparse problem
        if part == "lse":
            lse[lse.isneginf()] = 0.0
        if part == "nan":
            out[0, 0, 0, 0] = torch.nan
        if part == "error" and call.is_causal:
            raise RuntimeError("CUDA error: misaligned address")
        return out, lse

    def backward(call):
        dq, dk, dv = reference.backward(call)
        return (dq, dk * 1.1, dv) if part == "dk" else (dq, dk, dv)

    return Backend(
        name="broken", priority=0, available=lambda: None, supports=serves, forward=forward,
        backward=backward,
    )  # fmt: skip


def serves(problem: Problem) -> str | None:
    return None if problem.precision == "native" else "native only"


@pytest.mark.parametrize(
    ("part", "shown"),
    [("none", ""), ("out", "WRONG"), ("lse", "WRONG"), ("nan", "WRONG"), ("dk", "WRONG"),
     ("error", "RuntimeError: CUDA error: misaligned address")],
)  # fmt: skip
def test_every_fault_is_seen(part, shown, monkeypatch, capsys):
    monkeypatch.setattr(run, "checked_backends", lambda: [broken(part)])
    monkeypatch.setitem(registry._backends, "broken", broken(part))
    registry.forget_choices()
    try:
        code, text = check(capsys, "--quick")
    finally:
        registry.forget_choices()
    assert code == (part != "none"), text
    assert shown in text
    assert part != "error" or "radial" not in text  # a poisoned process computes nothing more


def test_it_ends_in_time_and_says_what_it_left_out(monkeypatch, capsys):
    """A clock that ticks once per look; problems of --quick come first."""
    ticks = itertools.count()
    monkeypatch.setattr(command.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(command, "rows_of", lambda problem, device: [
        run.Row(problem.name, "fast", "forward", "out", 0.0, 1.0)
    ])  # fmt: skip
    code, text = check(capsys, "--seconds", "4")
    assert code == 0 and "not reached: " in text
    reached, _, left = text.partition("not reached: ")
    assert "4 of 4 right" in reached and "dense, grouped heads" in left
    assert all(p.quick for p in problems.NATIVE if f"{p.name} " in reached.replace("│", " "))


def test_without_any_fast_backend(monkeypatch, capsys):
    monkeypatch.setattr(run, "checked_backends", lambda: [])
    code, text = check(capsys, "--quick")
    assert code == 1 and "no backend but the slow reference" in text


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_here(device, capsys):
    assert cli.main(["check", "--device", device]) == 2
    assert "--device" in capsys.readouterr().err


def test_problems_hide_what_may_not_be_read():
    """NaN in keys that no list names, or that lie past the valid ones of a block."""
    hiding = set()
    for problem in problems.problems(PRECISIONS, quick=False):
        built, again = (problem.build(torch.device("cpu")) for _ in range(2))
        assert torch.equal(built.tensors[0], again.tensors[0])
        if built.tensors[1].isnan().any():
            hiding.add(problem.name)
    assert {"sliding ragged tiles, text", "lists of 64, valid lengths"} <= hiding
    assert "dense" not in hiding
