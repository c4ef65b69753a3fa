"""The benchmarks: what is wrong is never timed, a peer that cannot run is a row, records are whole.

Nothing here is about speed.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from video_attn import attention
from video_attn.device import device_info
from video_attn.tools.bench import Result, Timing, WrongResultError, record_path, time_interleaved
from video_attn.tools.bench import record as record_module
from video_attn.tools.bench import timing as timing_module

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def as_a_script_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' folder is on the path, and Triton's interpreter is nobody's peer."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def load(name: str) -> ModuleType:
    return import_module(name)


# -- timing ---------------------------------------------------------------------------------------


def test_slow_providers_take_fewer_turns(monkeypatch: pytest.MonkeyPatch):
    """At least three turns each, spread over the rounds; quick ones take all."""
    cost = {"quick": 0.01, "slow": 0.3, "very slow": 5.0}
    turns: list[str] = []

    class Clock:
        def time(self, run):
            turns.append(run())
            return timing_module._Sample(cost[turns[-1]], 1000.0 + len(turns), None)

    monkeypatch.setattr(timing_module, "_CpuClock", Clock)
    timings = time_interleaved(
        {name: (lambda name=name: name) for name in cost}, repeats=12, seconds=2.0
    )
    assert {name: len(t.samples) for name, t in timings.items()} == {
        "quick": 12, "slow": 6, "very slow": 3,
    }  # fmt: skip
    measured = turns[3:]  # after the warm-up
    assert measured.index("very slow") < 12 and "very slow" in measured[-3:]
    assert timings["quick"].sm_mhz > 1000 and timings["quick"].watts is None
    everybody = time_interleaved({name: (lambda name=name: name) for name in cost}, repeats=4)
    assert {len(t.samples) for t in everybody.values()} == {4}


def test_a_row_says_why_there_is_no_time():
    row = Result({"heads": 2}, "somebody", None, failure="not installed").as_dict()
    assert row == {
        "problem": {"heads": 2}, "provider": "somebody", "failure": "not installed", "metrics": {},
    }  # fmt: skip
    timed = Result({}, "we", Timing((0.001,), 1700.4, 650.0)).as_dict()
    assert (timed["median_ms"], timed["sm_mhz"], timed["watts"]) == (1.0, 1700, 650)
    assert "sm_mhz" not in Result({}, "we", Timing((0.001,))).as_dict()


def test_records_are_named_by_the_model(monkeypatch: pytest.MonkeyPatch):
    assert record_path("dense", "cpu").name == "dense_cpu.json"
    assert record_path("dense", "cpu").parent == FOLDER / "results"
    for name, model in (
        ("NVIDIA H100 80GB HBM3", "h100"), ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090", "4090"), ("Strange", "gpu"),
    ):  # fmt: skip
        facts = replace(device_info("cpu"), name=name)
        monkeypatch.setattr(record_module, "device_info", lambda device, facts=facts: facts)
        assert record_path("x", "cuda").name == f"x_{model}.json"


# -- checking before timing ------------------------------------------------------------------------


def providers_of(peers: ModuleType, **runs: Any) -> list[Any]:
    return [
        peers.Provider(name.replace("_", " "), lambda case, run=run: run, ours=name == "ours")
        for name, run in runs.items()
    ]


def test_what_is_wrong_is_not_timed():
    cases, measure, peers = load("cases"), load("measure"), load("peers")
    case = cases.make_dense_case(96, 2, 16, "float32", "cpu")

    def fails(q, k, v):
        raise RuntimeError("no kernel\nfor this")

    def half_wrong(q, k, v):
        out = attention(q, k, v)
        return torch.cat([out[:, :1], out[:, 1:] * 1.01], 1)  # the last head is off

    def wrong_gradient(q, k, v):
        return attention(q, k.detach() + 0 * k, v)

    good = attention
    results = measure.time_case(
        case,
        providers_of(
            peers, ours=good, fails=fails, half_wrong=half_wrong, wrong_gradient=wrong_gradient
        ),
        1, True,
    )  # fmt: skip
    timed = {(r.problem["pass"], r.provider) for r in results if r.timing is not None}
    assert timed == {("forward", "ours"), ("backward", "ours")}
    failures = {r.provider: r.failure for r in results if r.timing is None}
    assert failures["fails"] == "no kernel for this"
    assert "out of head 1: relative error 1.00e-02" in failures["half wrong"]
    assert "dk of head 0" in failures["wrong gradient"]
    with pytest.raises(WrongResultError, match="ours, out of head 1"):
        measure.time_case(case, providers_of(peers, ours=half_wrong), 1, False)


def test_peers_that_are_absent_say_so():
    cases, measure, peers = load("cases"), load("measure"), load("peers")
    case = cases.vsa_case(256, 64, 2, 2, 64, "float32", "cpu", cases.NEAR)
    others = [*peers.vsa_peers(), *peers.quantized_peers()]
    results = measure.time_case(case, others, 1, False)
    assert {r.provider for r in results} == {"fastvideo-kernel", "FlashInfer cake", "sageattention"}
    assert all("pip install" in r.failure for r in results)


def test_neighbouring_lists_are_near():
    cases = load("cases")
    distance = {}
    for lists in (cases.NEAR, cases.RANDOM):
        mask = cases.vsa_case(64 * 96, 64, 9, 2, 8, "float32", "cpu", lists).mask
        assert (mask.kv_num_blocks == 9).all() and (mask.kv_indices.diff(dim=-1) > 0).all()
        rows = torch.arange(96)[:, None]
        distance[lists] = (mask.kv_indices - rows).abs().float().mean()
        own = (mask.kv_indices == rows).any(-1).float().mean()
        assert own > 0.95 or lists == cases.RANDOM
    assert distance[cases.NEAR] < 0.7 * distance[cases.RANDOM]


# -- the scripts -----------------------------------------------------------------------------------

SMALL = {
    "bench_dense": ["--tokens", "128", "--heads", "1"],
    "bench_sta": ["--grid", "6x8x16", "--heads", "1"],
    "bench_vsa_hopper": ["--tokens", "640", "--heads", "1"],
    "bench_quantized": ["--tokens", "128"],
    "bench_host": ["--tokens", "128"],
    "bench_coverage": ["--tokens", "200", "--heads", "1"],
}


@pytest.mark.parametrize("name", SMALL)
def test_scripts_write_whole_records(name, tmp_path, monkeypatch, capsys):
    """Each runs to its end where FlexAttention fails, and says what it does meanwhile."""
    peers = load("peers")

    def broken():
        raise RuntimeError("does not compile here")

    monkeypatch.setattr(peers, "compiled_flex", broken)
    script, path = load(name), tmp_path / "record.json"
    words = ["--device", "cpu", "--repeats", "1", "--output", str(path), *SMALL[name]]
    assert script.main(words) == 0
    record = json.loads(path.read_text())
    assert record["benchmark"] == name and record["machine"]["cpu"] and record["commit"]
    rows = record["results"]
    assert all("median_ms" in row or row["failure"] for row in rows)
    assert any(row["provider"].startswith(("video_attn", "attention, cpu")) for row in rows)
    flex = [row for row in rows if "FlexAttention" in row["provider"]]
    assert all(row["failure"] == "does not compile here" for row in flex)
    assert flex or name in ("bench_dense", "bench_host")
    shown = capsys.readouterr()
    assert " s  " in shown.err and str(path) in shown.out


def test_documented_scripts_need_no_option():
    """Without arguments every script has a device, sizes and a place for its record."""
    for name in (*SMALL, "bench_triton_codes", "bench_first_call"):
        options = load(name).parse([])
        assert None not in vars(options).values(), name
        assert Path(options.output).parent == FOLDER / "results"
    assert sys.modules["bench_dense"].parse([]).output == record_path(
        "dense", "cuda" if torch.cuda.is_available() else "cpu"
    )


def test_an_old_run_takes_in_no_other_peer(monkeypatch: pytest.MonkeyPatch):
    """On a GPU, and never one of ours: the run must end, and what is left out is said."""
    cases, measure, peers = load("cases"), load("measure"), load("peers")
    case = cases.make_dense_case(64, 1, 16, "float32", "cpu")
    everybody = providers_of(peers, ours=attention, theirs=attention)
    assert all(r.timing for r in measure.time_case(case, everybody, 1, False))
    monkeypatch.setattr(measure, "elapsed", lambda: 1e9)
    assert all(r.timing for r in measure.time_case(case, everybody, 1, False))  # a CPU has time

    class OnGpu(cases.Case):
        device = torch.device("cuda")

    monkeypatch.setattr(measure, "time_interleaved", lambda runs, **_: {
        name: Timing((float(run() is None) + 1,)) for name, run in runs.items()
    })  # fmt: skip
    on_gpu = OnGpu(case.tensors, case.grad, case.mask, case.problem)
    rows = {r.provider: r for r in measure.time_case(on_gpu, everybody, 1, False)}
    assert rows["ours"].timing is not None and rows["theirs"].timing is None
    assert rows["theirs"].failure.startswith("left out")


def test_first_call_says_what_each_cache_costs(tmp_path, monkeypatch, capsys):
    """Empty, filled by that, and filled by warmup: each process gets the folder that it is for."""
    script, path = load("bench_first_call"), tmp_path / "record.json"
    folders: list[tuple[str, str]] = []

    def steps(head_dim: int, folder: str, backend: str) -> tuple[float, float]:
        folders.append(("steps", folder))
        return 30.0, 0.002

    def warmup(options, folder: str) -> float:
        folders.append(("warmup", folder))
        return 12.0

    monkeypatch.setattr(script, "fresh_process_steps", steps)
    monkeypatch.setattr(script, "warmup_seconds", warmup)
    monkeypatch.setattr(script, "run_benchmark", lambda measure, options: measure(options))
    results = script.main(["--device", "cuda", "--output", str(path)])
    (_, cold), (_, again), (_, warm), (last, after) = folders
    assert cold == again != warm == after and last == "steps"
    assert [x.timing.median for x in results] == [30.0, 30.0, 12.0, 30.0]
    assert results[0].metrics == {"second_ms": 2.0} and not results[2].metrics
    assert "warmup" in capsys.readouterr().out


def test_first_call_gives_its_processes_a_cache(monkeypatch):
    script = load("bench_first_call")
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    monkeypatch.delenv("VIDEO_ATTN_BACKEND", raising=False)
    with script.environment(TRITON_CACHE_DIR="here", VIDEO_ATTN_BACKEND="triton"):
        assert os.environ["TRITON_CACHE_DIR"] == "here"
    assert os.environ["TRITON_CACHE_DIR"] == "before" and "VIDEO_ATTN_BACKEND" not in os.environ
