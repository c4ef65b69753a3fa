"""The CogVideoX example and the code of docs/radial.md, on tiny weights."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import av
import pytest
from tiny_cogvideox import (
    FRAMES,
    HEIGHT,
    TEXT,
    WIDTH,
    CogVideoXPipeline,
    saved,
)

# -- the example -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "cogvideox_t2v_inference.py"
    spec = importlib.util.spec_from_file_location("cogvideox_t2v_inference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(
    example: Any, capsys: pytest.CaptureFixture, output: Path, arguments: list[str]
) -> str:
    """What it printed; the video must be there and have the right size."""
    common = ["--num_inference_steps", "4", "--dtype", "float32", "--output_file", str(output)]
    assert example.main([*arguments, *common]) == 0
    with av.open(str(output)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == FRAMES and frames[0].shape == (HEIGHT, WIDTH, 3)
    return " ".join(capsys.readouterr().out.split())


def test_example(example: Any, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    documented = [
        "--model_id", str(saved("2b")), "--prompt", "A cat", "--pattern", "radial",
        "--dense_layers", "2", "--dense_timesteps", "1", "--decay_factor", "1.0",
        "--use_sage_attention", "--enable_model_cpu_offload",
    ]  # fmt: skip
    printed = run_example(example, capsys, tmp_path / "a.mp4", documented)
    assert "radial attention over 116 tokens: 16 text, 5 x 4 x 5 video" in printed
    assert "precision sage_fp16" in printed and "4/4" in printed
    assert "3 sparse and 9 dense attention calls" in printed
    assert "s per step" in printed and "density of a sparse step" in printed


@pytest.mark.parametrize("arguments, sparse, dense", [
    (["--preset", "short"], 2, 10),
    (["--preset", "short", "--dense_layers", "0", "--use_fused_attention"], 3, 9),
    (["--preset", "long"], 0, 12),
    (["--preset", "low_memory", "--dense_timesteps", "0"], 4, 8),
    (["--pattern", "dense", "--enable_sequential_cpu_offload"], 0, 12),
    (["--scene_boundaries", "0,7,17", "--scene_adjacency", "10,11", "--dense_timesteps", "3"],
     1, 11),
])  # fmt: skip
def test_example_presets_and_scenes(
    example: Any, capsys: pytest.CaptureFixture, tmp_path: Path,
    arguments: list[str], sparse: int, dense: int,
) -> None:  # fmt: skip
    model = ["--model_id", str(saved("1.5")), "--height", str(HEIGHT), "--width", str(WIDTH)]
    printed = run_example(example, capsys, tmp_path / "b.mp4", [*model, *arguments])
    assert f"{sparse} sparse and {dense} dense attention calls" in printed


@pytest.mark.parametrize("arguments", [
    ["--pattern", "svg"], ["--preset", "best"], ["--dense_layer", "2"],
    ["--scene_boundaries", "0,x"], ["--scene_adjacency", "12,21"],
    ["--enable_model_cpu_offload", "--enable_sequential_cpu_offload"],
])  # fmt: skip
def test_wrong_options_of_the_example(example: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.parse(arguments)


# -- the page --------------------------------------------------------------------------------------


def test_python_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/radial.md from top to bottom, its model and sizes replaced by tiny ones."""
    page = (Path(__file__).parents[2] / "docs" / "radial.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    tiny = {
        "THUDM/CogVideoX-2b": str(saved("2b")), "bfloat16": "float32",
        "height=480": f"height={HEIGHT}", "width=720": f"width={WIDTH}",
        "num_frames=49": f"num_frames={FRAMES}", "7: ": "1: ", "(9, 3)": "(2, 1)",
    }  # fmt: skip

    class ShortPipeline(CogVideoXPipeline):
        def __call__(self, **options: Any) -> Any:
            return super().__call__(
                max_sequence_length=TEXT, num_inference_steps=9, output_type="np", **options
            )

    monkeypatch.setattr("diffusers.CogVideoXPipeline", ShortPipeline)
    names: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        for old, new in tiny.items() if number < 2 else ():
            snippet = snippet.replace(old, new)
        exec(compile(snippet, f"docs/radial.md, snippet {number}", "exec"), names)
        if number < 2:
            assert names["video"].shape == (FRAMES, HEIGHT, WIDTH, 3)
        else:
            assert names["out"].isfinite().all() and names["mask"].density() < 1
    assert names["handle"].sparse_calls == 2  # 9 - 5 - 2 steps, the last of 3 layers
