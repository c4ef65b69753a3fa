"""`video-attn render`: videos, their records, and what is captured on the way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from render_cases import LAYERS, SMALL, STEPS, TOKENS, frames_of, load, own_video, record_of, render
from tiny_cogvideox import saved
from tiny_wan_pipeline import tiny_pipeline as tiny_wan
from torch.nn import functional as F
from video_cases import quick_backend

from video_attn import cli
from video_attn.attention_types import ATTENTION_TYPES
from video_attn.tools.capture import find_captures, load_capture
from video_attn.tools.render import session
from video_attn.tools.render.attention import ModelAttention
from video_attn.tools.render.command import PROMPT
from video_attn.tools.render.kinds import parse_kind
from video_attn.tools.render.model import model_label
from video_attn.tools.stitch.sources import open_sources
from video_attn.tools.video import Clip

pytestmark = pytest.mark.usefixtures("on_quick_backend")
PATTERNS = ["sta:window=1x1x1:tile=2x2x2", "vsa:top_k=1:tile=3x2x2:dense_layers=1",
            "radial:decay_factor=0.1:block_size=4:dense_first_steps=1"]  # fmt: skip


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video of every type, made by one `compare`; its captures are in q/."""
    folder = tmp_path_factory.mktemp("rendered")
    types = ",".join([*ATTENTION_TYPES, *PATTERNS])
    words = ["compare", "--model-path", str(saved("2b")), "--output-dir", str(folder), "--types",
             types, "--stitch", "--save_inputs", "--input_dir", str(folder / "q"), "--", *SMALL,
             "--max_captures", "4"]  # fmt: skip
    with quick_backend():
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


def test_the_round_trip(rendered: Path, tmp_path: Path) -> None:
    """Rendered, captured, benchmarked: every kernel is right on what a model really asks."""
    table = tmp_path / "x.csv"
    words = ["bench-kernels", "--load_captured", "--captured_dir", str(rendered / "q"), "--kernel",
             "all", "--compare_to_ref", "--device", "cpu", "--repeats", "1", "--sample_rate", "9",
             "--csv", str(table)]  # fmt: skip
    assert cli.main(words) == 0
    assert len(table.read_text().splitlines()) == 1 + 4 * len(ATTENTION_TYPES)
