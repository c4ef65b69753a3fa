"""Captures: both formats, what is refused, the writer's selection and index, full disks, death."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from video_attn import cli
from video_attn.tools.capture import (
    Capture,
    CaptureError,
    CaptureWriter,
    Facts,
    Selection,
    find_captures,
    load_capture,
    writer,
)
from video_attn.tools.capture.files import save_capture

FACTS = Facts(
    kernel="sagev1", call_idx=7, layer=1, step=3, timestep=749.0, grid=(3, 4, 5), text_length=16,
    text_first=True, scale=0.25,
)  # fmt: skip


def tensors(length: int = 76, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, length, 16, generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(2, length, 4, 16, generator=generator).to(dtype).transpose(1, 2)  # a view
    return q, k, v


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_round_trip(tmp_path: Path, file_format: str) -> None:
    path = tmp_path / f"sagev1_input_000007.{file_format}"
    q, k, v = tensors()
    save_capture(Capture(q, k, v.contiguous(), FACTS), path)
    again = load_capture(path)
    assert again.facts == FACTS
    for new, old in ((again.q, q), (again.k, k), (again.v, v)):
        assert new.dtype == old.dtype and torch.equal(new, old)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_documented_keys(tmp_path: Path) -> None:
    """A .pt file and its metadata hold what the documents say, and load as plain data."""
    filled(tmp_path, "pt")
    content = torch.load(tmp_path / "sagev1_input_000000.pt", weights_only=True)
    q, _, _ = tensors()
    assert torch.equal(content["q"], q) and not content["v"].is_cuda
    for name in "qkv":
        assert content[f"{name}_shape"] == (2, 4, 76, 16) == tuple(content[name].shape)
    assert content["dtype"] == "torch.bfloat16" and content["call_idx"] == 0
    assert content["kwargs"] == {"is_causal": False, "softmax_scale": 0.25}
    metadata = torch.load(tmp_path / "sagev1_metadata.pt", weights_only=True)
    assert metadata["total_calls"] == 6 and metadata["saved_count"] == 3
    assert list(metadata["captured_shapes"].values()) == [[0, 1, 2]]
    assert json.loads((tmp_path / "sagev1_metadata.json").read_text()) == json.loads(
        json.dumps(metadata)
    )


def filled(folder: Path, file_format: str = "safetensors", **selection: Any) -> CaptureWriter:
    """After 2 steps of 3 layers."""
    made = CaptureWriter(
        folder, "sagev1", Selection(**{"max_captures": 3} | selection), file_format
    )
    offer(made)
    made.close()
    return made


def offer(made: CaptureWriter, steps: int = 2) -> None:
    for call in range(3 * steps):
        facts = FACTS.model_copy(update={"layer": call % 3, "step": call // 3})
        made.offer(*tensors(), facts)


@pytest.mark.parametrize(("selection", "calls"), [
    ({}, [0, 1, 2]),
    ({"max_captures": 0}, [0, 1, 2, 3, 4, 5]),
    ({"layers": (1, 9), "max_captures": 0}, [1, 4]),
    ({"steps": (1,), "max_captures": 2}, [3, 4]),
    ({"every": 2, "max_captures": 0}, [0, 2, 4]),
    ({"layers": (0, 2), "every": 3, "max_captures": 0}, [0, 5]),
], ids=str)  # fmt: skip
def test_selection(tmp_path: Path, selection: dict[str, Any], calls: list[int]) -> None:
    made = filled(tmp_path, **selection)
    captures = [load_capture(path).facts for path in find_captures(tmp_path)]
    assert [facts.call_idx for facts in captures] == calls
    assert [(facts.step, facts.layer) for facts in captures] == [divmod(c, 3) for c in calls]
    assert made.selection.planned(layers=3, steps=2) == len(calls)


def test_a_new_run_replaces_the_old_one_of_that_kernel(tmp_path: Path) -> None:
    """No stale files, and nothing of anybody else is touched."""
    filled(tmp_path, "pt")
    others = ["fav2_input_000000.pt", "sagev1_input_notes.pt", "my_sagev1_input_000001.pt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".sagev1_input_000009.pt.part").write_text("what a killed process left")
    made = filled(tmp_path, max_captures=1)
    assert made.replaced == 3
    names = sorted(path.name for path in tmp_path.iterdir())
    own = ["sagev1_input_000000.safetensors", "sagev1_metadata.json"]
    assert names == sorted(own + others)


def test_order_of_captures(tmp_path: Path) -> None:
    """By number, also where the numbers of another program have no zeros in front."""
    for name in ("a_input_10.pt", "a_input_9.pt", "A_input_000011.safetensors", "a_metadata.pt"):
        (tmp_path / name).write_text("")
    names = [path.name for path in find_captures(tmp_path)]
    assert names == ["A_input_000011.safetensors", "a_input_9.pt", "a_input_10.pt"]


# -- foreign files --------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


def dictionary(**changes: Any) -> dict[str, Any]:
    q, k, v = tensors()
    return {"q": q, "k": k, "v": v, "call_idx": 3, "kwargs": {}} | changes


def test_a_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, save in enumerate((torch.save, lambda x, path: path.write_bytes(pickle.dumps(x)))):
        path = tmp_path / f"sagev1_input_{number}.pt"
        save(dictionary(kwargs={"is_causal": Bomb()}), path)
        with pytest.raises(CaptureError, match=rf"{path.name} is not a capture"):
            load_capture(path)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(CaptureError, match="more than tensors and plain values"):
        load_capture(tmp_path / "sagev1_input_0.pt")


def test_a_capture_of_another_program(tmp_path: Path) -> None:
    """Without layout and facts: they come from the name, the kwargs, or the caller."""
    path = tmp_path / "_fav3_sage_input_12.pt"
    content = dictionary(kwargs={"is_causal": True, "dropout_p": 0.0, "softmax_scale": 0.5})
    torch.save({k: v for k, v in content.items() if k != "call_idx"}, path)
    facts = load_capture(path).facts
    assert (facts.kernel, facts.call_idx, facts.layout) == ("_fav3_sage", 12, "bhsd")
    assert facts.is_causal and facts.scale == 0.5
    swapped = load_capture(path, layout="bshd")
    assert swapped.as_bhsd().q.shape == (2, 76, 4, 16)


@pytest.mark.parametrize(("content", "named"), [
    (b"", "cannot read"),
    (b"PK\x03\x04 half an archive", "cannot read"),
    ([1, 2], "a list"),
    (dictionary(k=None), "no tensor 'k'"),
    (dictionary(k=torch.zeros(2, 4, 76, 8)), "do not fit together"),
    (dictionary(v=torch.zeros(2, 4, 75, 16, dtype=torch.bfloat16)), "do not fit together"),
    (dictionary(v=torch.zeros(2, 4, 76, 16)), "differ in dtype"),
    (dictionary(q=torch.zeros(2, 4, 0, 16)), "none empty"),
    (dictionary(q=torch.zeros(2, 4, 76, 16, dtype=torch.int8)), "int8"),
    (dictionary(q=torch.zeros(2, 4, 76, 16).to_sparse()), "sparse"),
    (dictionary(q=torch.zeros(2, 4, 76, 16, device="meta")), "meta"),
    (dictionary(layer=-1), "layer"),
    (dictionary(layout="sbhd"), "layout"),
    (dictionary(grid=(1, 2)), "grid"),
    (dictionary(is_causal="no"), "is_causal"),
    (dictionary(kwargs={"softmax_scale": "wide"}), "scale"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_files_that_are_no_captures(tmp_path: Path, content: Any, named: str) -> None:
    path = tmp_path / "x_input_000001.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CaptureError, match=named) as caught:
        load_capture(path)
    assert path.name in str(caught.value)


def test_safetensors_that_are_no_captures(tmp_path: Path) -> None:
    path = tmp_path / "x_input_000001.safetensors"
    for write in (
        lambda: path.write_bytes(b"\xff" * 40),
        lambda: save_file({"weight": torch.ones(2, 2)}, path),
        lambda: save_file({n: torch.ones(1, 1, 4, 8) for n in "qkv"}, path,
                          metadata={"video_attn_capture": "[1, 2"}),
        lambda: save_file({n: torch.ones(1, 1, 4, 8) for n in "qkv"}, path,
                          metadata={"video_attn_capture": '{"layer": "first"}'}),
    ):  # fmt: skip
        write()
        with pytest.raises(CaptureError, match=path.name):
            load_capture(path)


def test_folders(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CaptureError, match="--save_inputs"):
            find_captures(folder)


# -- trouble while capturing ----------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """The operating system refuses files of more than 40 kB, as a quota does; a capture has 58."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails(tmp_path: Path, file_format: str) -> None:
    made = CaptureWriter(tmp_path, "sagev1", Selection(), file_format)
    small = tuple(x[:, :1, :20] for x in tensors())
    made.offer(*small, FACTS)
    made.offer(*tensors(), FACTS)
    assert made.failure is not None and made.is_full
    made.offer(*small, FACTS)
    made.close()
    assert made.total_calls == 3
    assert len(find_captures(tmp_path)) == 1
    index = json.loads((tmp_path / "sagev1_metadata.json").read_text())
    assert index["saved_count"] == 1 and index["failure"] == made.failure
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen before the write; some room is left for the video."""
    made = CaptureWriter(tmp_path, "sagev1", Selection())
    made.offer(*tensors(), FACTS)
    usage = (10**9, 10**9 - writer.RESERVE, writer.RESERVE)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("U", (), {"free": usage[2]}))
    made.offer(*tensors(), FACTS)
    assert made.failure is not None and "MB free" in made.failure
    assert len(made.saved) == 1


def test_a_killed_process_leaves_whole_captures(tmp_path: Path) -> None:
    """SIGKILL while it writes: every capture that is there can be read, and so can the index."""
    child = os.fork()  # a new Python would take longer to start than all the rest
    if child == 0:
        try:
            torch.set_num_threads(1)
            offer(CaptureWriter(tmp_path, "sagev1", Selection(max_captures=0), "pt"), steps=10_000)
        finally:
            os._exit(1)
    while len(list(tmp_path.glob("*_input_*"))) < 5:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    captures = find_captures(tmp_path)
    for number, path in enumerate(captures):
        assert load_capture(path).facts.call_idx == number
    index = json.loads((tmp_path / "sagev1_metadata.json").read_text())
    assert len(captures) - 1 <= index["saved_count"] <= len(captures)
    assert torch.load(tmp_path / "sagev1_metadata.pt", weights_only=True)["saved_count"] >= 4


# -- capture-info ---------------------------------------------------------------------------------


def test_capture_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    assert cli.main(["capture-info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "3 captures" in text and "2×4×76×16" in text and "16 first" in text and "3×4×5" in text
    (tmp_path / "sagev1_input_000009.pt").write_text("nothing")
    assert cli.main(["capture-info", str(tmp_path), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in rows[:3]] == [0, 1, 2] and "error" in rows[3]
    assert cli.main(["capture-info", str(tmp_path)]) == 1
    assert "sagev1_input_000009.pt is not a capture" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["capture-info", str(tmp_path / "absent")]) == 2
