"""`video-attn render` and `compare`: videos, records, captures and trouble, on a tiny CogVideoX."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from tiny_cogvideox import saved
from tiny_models import MODELS as TINY
from tiny_models import output
from tiny_wan_pipeline import tiny_pipeline as tiny_wan
from torch.nn import functional as F

from video_attn import cli, registry
from video_attn.attention_types import ATTENTION_TYPES
from video_attn.functional.patterns import Dense, Radial, SlidingTile, VideoSparse
from video_attn.tools import UsageError
from video_attn.tools.capture import CaptureWriter, Selection, find_captures, load_capture
from video_attn.tools.render import attention, compare, session
from video_attn.tools.render.attention import ModelAttention
from video_attn.tools.render.command import PROMPT
from video_attn.tools.render.kinds import parse_kind
from video_attn.tools.render.model import load_pipeline, model_label
from video_attn.tools.stitch.sources import open_sources
from video_attn.tools.video import Clip

LAYERS, STEPS, TOKENS = 3, 2, 34  # of the model; of a run; 16 text and 3 x 2 x 3 video
SMALL = ["--num_inference_steps", "2", "--height", "32", "--width", "48", "--num_frames", "9",
         "--device", "cpu"]  # fmt: skip
PATTERNS = ["sta:window=1x1x1:tile=2x2x2", "vsa:top_k=1:tile=3x2x2:dense_layers=1",
            "radial:decay_factor=0.1:block_size=4:dense_first_steps=1"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick_backend() -> Iterator[None]:
    """The CPU backend, or the reference where it is not built: never Triton's interpreter."""
    built = {b.name for b in registry.backends() if b.available() is None}
    with registry.use_backend("cpu" if "cpu" in built else "reference"):
        yield


def render(*words: str, model: str = "2b") -> int:
    return cli.main(["render", "--model_path", str(saved(model)), *SMALL, *words])


def record_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def frames_of(path: Path) -> Clip:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video of every type, made by one `compare`; its captures are in q/."""
    folder = tmp_path_factory.mktemp("rendered")
    types = ",".join([*ATTENTION_TYPES, *PATTERNS])
    words = ["compare", "--model-path", str(saved("2b")), "--output-dir", str(folder), "--types",
             types, "--stitch", "--save_inputs", "--input_dir", str(folder / "q"), "--", *SMALL,
             "--max_captures", "4"]  # fmt: skip
    assert cli.main(words) == 0
    return folder


# -- videos and their records ---------------------------------------------------------------------


def test_videos_of_every_type(rendered: Path) -> None:
    labels = [parse_kind(text).label for text in (*ATTENTION_TYPES, *PATTERNS)]
    for label in labels:
        path = rendered / f"cogvideox-2b_{label}.mp4"
        assert frames_of(path).shape == (9, 32, 48, 3)
        record = record_of(path)
        assert record["options"]["seed"] == 42 and record["options"]["prompt"] == PROMPT
        assert record["video"] == {"frames": 9, "height": 32, "width": 48}
        assert len(record["seconds_per_step"]) == STEPS
        assert record["sparse_calls"] + record["dense_calls"] == LAYERS * STEPS
        assert record["machine"] and record["versions"]["torch"] and record["commit"]
    grid = frames_of(rendered / "comparison_grid.mp4")
    assert grid.shape == (9, 96, 144, 3)  # nine videos


def test_calls_are_counted(rendered: Path) -> None:
    sparse = {
        parse_kind(text).label: record_of(rendered / f"cogvideox-2b_{parse_kind(text).label}.mp4")
        for text in (*ATTENTION_TYPES, *PATTERNS)
    }
    counts = {label: record["sparse_calls"] for label, record in sparse.items()}
    expected = dict.fromkeys(ATTENTION_TYPES, 0) | dict(
        zip((parse_kind(text).label for text in PATTERNS), (6, 4, 3), strict=True)
    )
    assert counts == expected
    assert sparse["sdpa"]["backends"] == {"dense": "the model's own"}
    assert set(sparse["sagev1"]["backends"].values()) <= {"cpu", "reference"}


def test_quality_against_sdpa(rendered: Path) -> None:
    """Dense types give the video again, quantized or not; a pattern gives another one."""
    quality = {
        label: record_of(rendered / f"cogvideox-2b_{label}.mp4")["quality"]
        for label in (parse_kind(text).label for text in (*ATTENTION_TYPES, *PATTERNS))
    }
    assert quality.pop("sdpa") is None
    for label, found in quality.items():
        psnr = math.inf if found["psnr_db"] is None else found["psnr_db"]
        assert found["reference"] == "cogvideox-2b_sdpa.mp4"
        assert psnr > (30 if label in ATTENTION_TYPES else 10), label
    a = frames_of(rendered / "cogvideox-2b_sdpa.mp4").astype(float)
    b = frames_of(rendered / "cogvideox-2b_fav3_fp8.mp4").astype(float)
    gap = np.abs(a - b).mean()
    assert quality["fav3_fp8"]["mean_absolute_difference"] == pytest.approx(gap, abs=1e-3)
    if gap:
        psnr = 10 * math.log10(255**2 / ((a - b) ** 2).mean())
        assert quality["fav3_fp8"]["psnr_db"] == pytest.approx(psnr, abs=0.01)


def test_sdpa_is_the_pipeline_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same frames as without us; and before and after, the processors are the model's."""
    pipe = load()
    processors = dict(pipe.transformer.attn_processors)
    video = own_video(pipe)
    kind, path = parse_kind("sta:window=1x1x1:tile=2x2x2"), tmp_path / "x.mp4"
    session.render(pipe, kind, wanted(), path, say=lambda text: None)
    assert pipe.transformer.attn_processors == processors
    assert not pipe.transformer._forward_pre_hooks
    assert np.array_equal(own_video(pipe), video)
    clips = []
    monkeypatch.setattr(session, "write_clip", keep(clips, session.write_clip))
    session.render(pipe, parse_kind("sdpa"), wanted(), path, say=lambda text: None)
    assert np.array_equal(clips[0], (video * 255).round())
    with pytest.raises(RuntimeError, match="stop"), ModelAttention(pipe, kind):
        raise RuntimeError("stop")
    assert pipe.transformer.attn_processors == processors


def keep(clips: list[Clip], write: Any) -> Any:
    def kept(path: Path, clip: Clip, fps: float) -> None:
        clips.append(clip)
        write(path, clip, fps)

    return kept


def load() -> Any:
    options = {"dtype": None, "device": "cpu", "offload": "none", "tiling": False}
    return load_pipeline(str(saved("2b")), **options)


def own_video(pipe: Any) -> np.ndarray:
    return pipe(
        PROMPT, negative_prompt="", num_inference_steps=2, height=32, width=48, num_frames=9,
        max_sequence_length=16, generator=torch.Generator("cpu").manual_seed(42),
        output_type="np",
    ).frames[0]  # fmt: skip


def wanted(**changes: Any) -> session.Wanted:
    call = {"prompt": PROMPT, "num_inference_steps": 2, "height": 32, "width": 48, "num_frames": 9}
    return session.Wanted("tiny", call | changes, 42, 8.0, None)


def test_output_and_fps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--output", "new/x.mkv", "--fps", "16", "--seed", "7", "--tiling", "--dtype", "bf16",
             "--guidance_scale", "1", "--attention_type", "fav3_sage"]  # fmt: skip
    assert render(*words, model="1.5") == 0
    [source], _ = open_sources([tmp_path / "new" / "x.mkv"])
    assert (source.fps, source.frames) == (16, 9)
    assert record_of(source.path)["options"]["guidance_scale"] == 1
    (tmp_path / "folder").mkdir()
    assert render("--output", "folder", model="5b") == 0
    assert (tmp_path / "folder" / "cogvideox-5b_sdpa.mp4").is_file()


def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rendered: Path) -> None:
    """The blocks are compiled, without a break of the graph; counts and video stay."""
    asked, real = [], torch.compile

    def eager(function: Any, **options: Any) -> Any:
        asked.append(options)
        return real(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", eager)
    path = tmp_path / "x.mp4"
    assert render("--compile", "--attention_type", "sagev1", "--output", str(path)) == 0
    assert [options["mode"] for options in asked] == ["max-autotune-no-cudagraphs"] * LAYERS
    assert record_of(path)["dense_calls"] == LAYERS * STEPS
    other = frames_of(rendered / "cogvideox-2b_sagev1.mp4").astype(int)
    assert np.abs(frames_of(path) - other).mean() < 1


def test_another_family(tmp_path: Path) -> None:
    """Wan 2.2, two transformers that share the steps: a class, names and sizes of its own."""
    model = tmp_path / "Wan2.2-tiny"
    tiny_wan(experts=2).save_pretrained(model)
    words = ["render", "--model_path", str(model), *SMALL, "--output", str(tmp_path),
             "--attention_type", "sta:window=1x1x1:tile=2x2x2:dense_last_steps=1", "--save_inputs",
             "--input_dir", str(tmp_path / "q"), "--num_inference_steps", "4", "--max_captures",
             "0", "--guidance_scale", "1"]  # fmt: skip
    assert cli.main(words) == 0
    label = "sta-window=1x1x1-tile=2x2x2-dense_last_steps=1"
    record = record_of(tmp_path / f"wan-2.2-tiny_{label}.mp4")
    assert (record["sparse_calls"], record["dense_calls"]) == (6, 2)  # 2 layers
    facts = [load_capture(path).facts for path in find_captures(tmp_path / "q")]
    assert [(f.step, f.layer) for f in facts] == [divmod(n, 2) for n in range(8)]
    assert {(f.grid, f.text_length) for f in facts} == {((3, 2, 3), 0)}


def test_names_of_models() -> None:
    names = {
        "THUDM/CogVideoX-2b": "cogvideox-2b", "zai-org/CogVideoX1.5-5B/": "cogvideox-1.5-5b",
        "/path/to/my_model": "cogvideox-my-model", "CogVideoX": "cogvideox-model",
    }  # fmt: skip
    assert {path: model_label(path, "CogVideoX") for path in names} == names
    assert model_label("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan") == "wan-2.1-t2v-1.3b-diffusers"


# -- compare --------------------------------------------------------------------------------------


def compared(folder: Path, types: str, *words: str) -> int:
    return cli.main(["compare", "--model-path", str(saved("2b")), "--output-dir", str(folder),
                     "--types", types, *words, "--", *SMALL])  # fmt: skip


def test_compare_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there of the same options stays, and then no model is loaded."""
    assert compared(tmp_path, "sdpa,fav2") == 0
    loads, real = [], compare.load

    def counted(args: Any) -> Any:
        loads.append(args)
        return real(args)

    monkeypatch.setattr(compare, "load", counted)
    path = tmp_path / "cogvideox-2b_fav2.mp4"
    before = path.stat().st_mtime_ns
    assert compared(tmp_path, "sdpa,fav2", "--stitch") == 0
    assert not loads and path.stat().st_mtime_ns == before
    assert "is there already" in capsys.readouterr().out
    path.write_bytes(b"")  # and its record stays: but the record alone is no video
    path.unlink()
    assert compared(tmp_path, "sdpa,fav2") == 0
    assert len(loads) == 1 and path.is_file()
    assert compared(tmp_path, "fav2", "--force") == 0
    assert len(loads) == 2
    assert cli.main(["compare", "--model-path", str(saved("2b")), "--output-dir", str(tmp_path),
                     "--types", "fav2", *SMALL, "--seed", "1"]) == 0  # fmt: skip
    assert len(loads) == 3 and record_of(path)["options"]["seed"] == 1
    assert record_of(path)["quality"] is None  # the sdpa video is of another seed


def test_compare_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention.named_attention

    def broken(q: Any, k: Any, v: Any, name: str, *rest: Any, **options: Any) -> Any:
        if name == "fav2":
            raise RuntimeError("no backend of attention type 'fav2' can serve")
        return right(q, k, v, name, *rest, **options)

    monkeypatch.setattr(attention, "named_attention", broken)
    assert compared(tmp_path, "fav2,sagev1,fav3", "--stitch") == 1
    text = capsys.readouterr().out
    assert "FAILED: fav2: no backend of attention type 'fav2' can serve" in text
    names = {path.name for path in tmp_path.glob("*.mp4")}
    assert names == {"cogvideox-2b_sagev1.mp4", "cogvideox-2b_fav3.mp4", "comparison_grid.mp4"}
    assert compared(tmp_path, "fav2", "--stitch") == 1
    assert "nothing to stitch" in capsys.readouterr().out


# -- captures -------------------------------------------------------------------------------------


def test_captures_are_those_of_the_video(rendered: Path) -> None:
    """Bit by bit what the pipeline's own attention of the video gets; never the text encoder's."""
    pipe, seen, real = load(), [], F.scaled_dot_product_attention

    def spy(query: Any, key: Any, value: Any, **options: Any) -> Any:
        if query.shape[2] == TOKENS:
            seen.append([x.clone() for x in (query, key, value)])
        return real(query, key, value, **options)

    F.scaled_dot_product_attention = spy
    try:
        own_video(pipe)
    finally:
        F.scaled_dot_product_attention = real
    assert len(seen) == LAYERS * STEPS
    paths = [path for path in find_captures(rendered / "q") if path.name.startswith("sdpa_")]
    assert len(paths) == 4
    timesteps = pipe.scheduler.timesteps.tolist()
    for number, path in enumerate(paths):
        capture = load_capture(path)
        facts = capture.facts
        assert (facts.step, facts.layer) == divmod(number, LAYERS) and facts.call_idx == number
        assert facts.grid == (3, 2, 3) and facts.text_length == 16 and facts.text_first
        assert facts.timestep == timesteps[facts.step or 0] and facts.kernel == "sdpa"
        for got, expected in zip((capture.q, capture.k, capture.v), seen[number], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan15"])
def test_padded_text(name: str, tmp_path: Path) -> None:
    """Padding is no part of a capture, and no type attends to it; items that differ are marked."""
    tiny = TINY[name]
    model, scheduler = tiny.model(), SimpleNamespace(timesteps=torch.tensor([500.0]))
    pipe = SimpleNamespace(transformer=model, scheduler=scheduler)
    expected = [output(model, tiny.inputs(batch)) for batch in (1, 2)]
    for text in ("sdpa", "fav2", "sta:window=9x9x9:tile=2x2x2"):
        made = CaptureWriter(tmp_path, "x", Selection())
        with ModelAttention(pipe, parse_kind(text), writer=made):
            for batch in (1, 2):
                got = output(model, tiny.inputs(batch))
                assert (got - expected[batch - 1]).abs().max() < 1e-4
        captures = [load_capture(path) for path in find_captures(tmp_path)]
        assert len(captures) == 2 * tiny.layers
        one, two = captures[0], captures[tiny.layers]
        assert one.facts.mask == "none" and two.facts.mask == "padded text"
        video = math.prod(tiny.grid)
        assert one.q.shape[2] == one.k.shape[2] == video + (one.facts.text_length or 0)
        assert two.q.shape[2] == video + (two.facts.text_length or 0)


def test_selected_captures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "q"
    words = ["--save_inputs", "--input_dir", str(folder), "--layers", "0,2", "--steps", "1",
             "--max_captures", "0", "--output", str(tmp_path)]  # fmt: skip
    assert render(*words) == 0
    facts = [load_capture(path).facts for path in find_captures(folder)]
    assert [(f.layer, f.step, f.call_idx) for f in facts] == [(0, 1, 3), (2, 1, 5)]
    text = capsys.readouterr().out
    assert "34 tokens (3 x 2 x 3 video, 16 text), batch 2, 2 heads of 16" in text
    assert "up to 2 captures of 26.11 kB" in text and "2 of 6 calls are captured" in text


def test_the_round_trip(rendered: Path, tmp_path: Path) -> None:
    """Rendered, captured, benchmarked: every kernel is right on what a model really asks."""
    table = tmp_path / "x.csv"
    words = ["bench-kernels", "--load_captured", "--captured_dir", str(rendered / "q"), "--kernel",
             "all", "--compare_to_ref", "--device", "cpu", "--repeats", "1", "--sample_rate", "9",
             "--csv", str(table)]  # fmt: skip
    assert cli.main(words) == 0
    assert len(table.read_text().splitlines()) == 1 + 4 * len(ATTENTION_TYPES)


def test_a_full_disk_ends_the_capture_not_the_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operating system refuses files above 20 kB, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    words = ["--save_inputs", "--input_dir", str(tmp_path / "q"), "--output", str(tmp_path)]
    try:
        assert render(*words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "FAILED: captures ended early" in capsys.readouterr().out
    assert len(frames_of(tmp_path / "cogvideox-2b_sdpa.mp4")) == 9
    index = json.loads((tmp_path / "q" / "sdpa_metadata.json").read_text())
    assert index["saved_count"] == 0 and index["failure"] and index["total_calls"] == 6


def test_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before anything is rendered, with the number that would fit."""
    free = SimpleNamespace(free=session.MARGIN + 100_000)
    monkeypatch.setattr(session.shutil, "disk_usage", lambda path: free)
    words = ["--save_inputs", "--input_dir", str(tmp_path / "q"), "--output", str(tmp_path)]
    assert render(*words) == 2
    assert "--max_captures 3 would fit" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mp4"))


def test_a_killed_rendering_leaves_its_captures(tmp_path: Path) -> None:
    """SIGKILL in the middle: captures and index are there and can be read."""
    words = ["--num_inference_steps", "900", "--save_inputs", "--input_dir", str(tmp_path),
             "--max_captures", "0", "--output", str(tmp_path)]  # fmt: skip
    saved("2b")
    child = os.fork()  # a new Python would take longer to start than all the rest
    if child == 0:
        try:
            torch.set_num_threads(1)
            render(*words)
        finally:
            os._exit(1)
    while len(list(tmp_path.glob("*_input_*"))) < 20:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    captures = find_captures(tmp_path)
    for number, path in enumerate(captures):
        facts = load_capture(path).facts
        assert (facts.step, facts.layer) == divmod(number, LAYERS)
    index = json.loads((tmp_path / "sdpa_metadata.json").read_text())
    assert len(captures) - 1 <= index["saved_count"] <= len(captures)
    assert not list(tmp_path.glob("*.mp4"))


# -- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "named"), [
    (["--attention_type", "fav4"], "fav4"),
    (["--attention_type", "sta:windows=3x3x3"], "windows"),
    (["--attention_type", "sdpa:tile=1x1x1"], "takes no options"),
    (["--attention_type", "radial:dense_layers=4"], "at most 3"),
    (["--height", "33"], "--height 33 must be a multiple of 16"),
    (["--input_dir", "x"], "--save_inputs"),
    (["--max_captures", "3"], "--save_inputs"),
    (["--save_inputs", "--layers", "0,3", "--input_dir", "q"], "--layers 3: there are layers 0 to"),
    (["--save_inputs", "--steps", "2,7", "--input_dir", "q"], "--steps 2,7"),
    (["--offload", "model"], "--offload"),
    (["--output", "x.avi"], ".mp4"),
    (["--device", "cuda:9"], "cuda:9"),
    (["--model_path", "no/such-model"], "no/such-model"),
])  # fmt: skip
def test_options_that_do_not_fit(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert render(*words) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message
    assert not list(tmp_path.glob("*.*"))


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model_index.json"):
        load_pipeline(str(tmp_path), dtype=None, device="cpu", offload="none", tiling=False)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UsageError, match="--model_path"):
        load_pipeline(str(tmp_path), dtype=None, device="cpu", offload="none", tiling=False)


def test_a_type_that_cannot_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with registry.use_backend("hopper"):
        assert render("--attention_type", "fav3", "--output", str(tmp_path)) == 1
    assert "hopper" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mp4"))


def test_what_the_pipeline_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ValueError is a message, not a traceback."""

    def refuse(*args: Any) -> None:
        raise ValueError("num_frames must be odd")

    monkeypatch.setattr(session, "_generate", refuse)
    assert render("--output", str(tmp_path)) == 1
    assert "num_frames must be odd" in capsys.readouterr().err


# -- attention types ------------------------------------------------------------------------------


def test_kinds() -> None:
    assert parse_kind("fav3_fp8").pattern == Dense() and not parse_kind("sdpa").is_sparse
    kind = parse_kind("sta:window=3x5x3:tile=2x4x4:dense_first_steps=12:precision=sage_fp8")
    assert kind.pattern == SlidingTile((3, 5, 3), (2, 4, 4)) and kind.precision == "sage_fp8"
    assert kind.schedule.dense_first_steps == 12
    assert kind.label == "sta-window=3x5x3-tile=2x4x4-dense_first_steps=12-precision=sage_fp8"
    assert parse_kind("vsa").pattern == VideoSparse(top_k_ratio=0.125)
    assert parse_kind("vsa:top_k=4").pattern == VideoSparse(top_k=4)
    assert parse_kind("radial:dense_last_steps=0.1").schedule.dense_last_steps == 0.1
    radial = parse_kind("radial:decay_factor=0.5:block_size=64").pattern
    assert isinstance(radial, Radial) and radial.block_size == 64


@pytest.mark.parametrize("text", [
    "", "STA", "sta:", "sta:window", "sta:window=3x3", "sta:window=0x1x1", "vsa:top_k_ratio=2",
    "vsa:top_k=1:top_k_ratio=0.5", "radial:block_size=0", "radial:decay_factor=wide",
    "radial:precision=fp4", "sta:dense_layers=-1",
])  # fmt: skip
def test_kinds_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError):
        parse_kind(text)
