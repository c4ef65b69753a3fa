"""examples/test_ltx2_vsa_integration.py: its options, its exit codes, what it measures."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import MODELS, output, random

import video_attn.sparsity as mtsa

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example() -> Any:
    spec = spec_from_file_location("ltx2_example", ROOT / "examples/test_ltx2_vsa_integration.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["ltx2_example"] = module
    spec.loader.exec_module(module)
    return module


class Pipeline:
    """The pipeline's call, around a tiny LTX-2: frames that its transformer makes."""

    def __init__(self) -> None:
        self.transformer = MODELS["ltx2"].model()
        self.scheduler = SimpleNamespace(timesteps=torch.tensor([1000.0, 500.0]))
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> tuple[Any, Any]:
        self.calls.append(options)
        grid = (options["num_frames"] - 1) // 8 + 1, options["height"] // 32, options["width"] // 32
        inputs = MODELS["ltx2"].inputs(1) | dict(
            zip(("num_frames", "height", "width"), grid, strict=True)
        )
        inputs["hidden_states"] = random(1, grid[0] * grid[1] * grid[2], 4)
        for _ in range(options["num_inference_steps"]):
            out = output(self.transformer, inputs)
        frames = out.sigmoid().mean(-1).view(1, grid[0], grid[1], grid[2], 1)
        frames = frames.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, -1, -1, -1, 3)
        return frames.numpy(), None


SIZES = ["--height", "192", "--width", "256", "--num-frames", "17", "--num-inference-steps", "2",
         "--device", "cpu", "--dtype", "float32", "--block-size", "2", "2", "2"]  # fmt: skip


def run(example: Any, monkeypatch: Any, tmp_path: Path, *words: str) -> tuple[int, Pipeline]:
    pipe = Pipeline()
    monkeypatch.setattr(example, "load_pipeline", lambda options: pipe)
    monkeypatch.chdir(tmp_path)
    code = example.main(["--checkpoint", "model.safetensors", *SIZES, *words])
    return code, pipe


def test_compare_loads_once_and_reports(
    example: Any, monkeypatch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, pipe = run(example, monkeypatch, tmp_path, "--compare", "--top-k-ratio", "0.25")
    out = capsys.readouterr().out
    assert code == 0
    # Warm-up and run, dense; the same, sparse.
    assert [call["num_inference_steps"] for call in pipe.calls] == [1, 2, 1, 2]
    assert "144 tokens in 24 tiles, of which a tile sees 6: marginal" in out
    assert "speed-up" in out and "PSNR to dense" in out and "density 0.2" in out
    assert "4 sparse calls" in out  # 2 blocks, 2 steps
    assert (tmp_path / "output_vsa.mp4").stat().st_size > 0
    assert (tmp_path / "output_baseline.mp4").stat().st_size > 0
    enabled = [n for n, m in mtsa.get_named_sparse_attention_modules(pipe) if m.is_enabled]
    assert enabled == [f"transformer.transformer_blocks.{i}.attn1" for i in range(2)]
    assert pipe.calls[0]["guidance_scale"] == 4.0 and pipe.calls[0]["frame_rate"] == 25.0


def test_no_vsa_and_a_single_run(example: Any, monkeypatch: Any, tmp_path: Path) -> None:
    code, pipe = run(example, monkeypatch, tmp_path, "--no-vsa")
    assert code == 0 and not mtsa.is_attn_sparsified(pipe)
    code, pipe = run(
        example, monkeypatch, tmp_path, "--skip-audio", "--top-k-ratio", "0.3", "--output", "my.mp4"
    )
    assert code == 0 and len(pipe.calls) == 2 and (tmp_path / "my.mp4").exists()


def test_exit_codes_are_honest(
    example: Any, monkeypatch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(options: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(example, "load_pipeline", broken)
    assert example.main(["--checkpoint", "x", *SIZES]) == 1
    assert "error: out of memory" in capsys.readouterr().out
    monkeypatch.setattr(example, "vsa_config", lambda options: {"sparse_cfg": {}})
    code, _ = run(example, monkeypatch, tmp_path)
    assert code == 1 and "VSA never ran" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["--compare"], "give --checkpoint"),
    (["--checkpoint", "x", "--compare", "--no-vsa"], "--compare needs the sparse run"),
    (["--checkpoint", "x", "--num-frames", "120"], "--num-frames must be a multiple of 8, plus 1"),
    (["--top-k-ratio", "0"], "--top-k-ratio"),
    (["--block_size", "4", "0", "4"], "must be positive"),
    (["--dtype", "int8"], "--dtype"),
])  # fmt: skip
def test_wrong_options(
    example: Any, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        example.main([*words, "--device", "cpu"])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_layer_alone(example: Any, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--top_k_ratio", "0.25", "--block_size", "2", "2", "4", "--video_shape", "4", "4", "8",
             "--batch_size", "2", "--device", "cpu", "--dtype", dtype]  # fmt: skip
    assert example.main(words) == 0
    out = capsys.readouterr().out
    assert "2 x 4x4x8 = 128 tokens" in out and "passed" in out and "density 0.250" in out


def test_a_layer_that_is_wrong_fails(
    example: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "_relative", lambda got, expected: 1.0)
    assert (
        example.main(["--video_shape", "2", "2", "2", "--device", "cpu", "--dtype", "float32"]) == 1
    )
    assert "FAILED" in capsys.readouterr().out


def test_psnr(example: Any) -> None:
    clip = np.full((2, 4, 4, 3), 0.5)
    assert example.psnr(clip, clip) == float("inf")
    assert example.psnr(clip, clip + 0.1) == pytest.approx(20.0)


def test_the_documents_path_works_from_the_root() -> None:
    words = ["--video_shape", "2", "4", "4", "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "test_ltx2_vsa_integration.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
