"""Every command line of the documents runs as printed: the real scripts, a tiny model, small sizes.

The lines stand in data/documented_commands.sh and run from top to bottom in one folder, as a person
would type them. Only what makes them big is exchanged, and nothing is added but sizes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_cogvideox import saved
from video_cases import quick_backend

from video_attn import cli
from video_attn.attention_types import ATTENTION_TYPES
from video_attn.tools.capture import find_captures, load_capture

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "tests" / "data" / "documented_commands.sh").read_text(encoding="utf-8")
SHELL_SCRIPTS = ("bench_quantized_attention.sh", "bench_quantized_attention_captured.sh")
VIDEO = "--num_inference_steps 2 --height 32 --width 48 --num_frames 9 --device cpu"
QUICK = "--device cpu --repeats 1"
# What is exchanged in a line.
SMALL = {"-sq 17776": "-sq 70", "-hq 30": "-hq 2", "-b 2": "-b 1"}
# What is added behind the command of a script.
SIZES = {
    "sageattn_cogvideo.py": VIDEO,
    "render_all_attention.sh": f"-- {VIDEO}",
    "stitch_comparison.py": "",
    "bench_cogvideo.py": f"{QUICK} --max_inputs 2",
    "bench_diffusion_attention.py": QUICK,
    "bench_quantized_attention.sh": f"{QUICK} --scale 0.001",
    "bench_quantized_attention_captured.sh": f"{QUICK} --max_inputs 2",
}


def command_lines() -> list[str]:
    lines = re.sub(r"\\\n\s*", "", TEXT).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout's scripts, in which every line has been run."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "op_tests", folder / "op_tests", symlinks=True)
    for name in SHELL_SCRIPTS:
        shutil.copy2(ROOT / name, folder / name)
    here = Path.cwd()
    os.chdir(folder)
    try:
        with quick_backend():
            for line in command_lines():
                run(line, folder)
            yield folder
    finally:
        os.chdir(here)


def run(line: str, folder: Path) -> None:
    """Runs one line, made small; it must succeed."""
    for big, small in SMALL.items():
        line = line.replace(big, small)
    model = str(saved("2b"))
    line = line.replace("/path/to/inputs", str(folder / "captured_inputs"))
    script = next(word for word in shlex.split(line) if word.endswith((".py", ".sh")))
    name = Path(script).name
    if "/path/to/local/model" in line:
        line = line.replace("/path/to/local/model", model)
    elif name == "sageattn_cogvideo.py":
        line += f" --model_path {model}"
    elif name == "render_all_attention.sh":
        line += f" --model-path {model}"
    words = shlex.split(f"{line} {SIZES[name]}")
    if words[0] == "python":
        assert run_python(words[1:]) == 0, line
    else:
        assert run_shell(words, folder) == 0, line


def run_python(words: list[str]) -> int:
    """A script in this process: starting Python anew for each would take most of the time."""
    before = sys.argv
    sys.argv = words
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = before
    code = end.value.code
    return code if isinstance(code, int) else 0


def run_shell(words: list[str], folder: Path) -> int:
    """A shell script, whose Python only notes what it shall run; then that is run here."""
    bin_, noted = folder / "bin", folder / "noted.json"
    bin_.mkdir(exist_ok=True)
    python = bin_ / "python3"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"print(json.dumps(sys.argv[1:]), file=open({str(noted)!r}, 'a'))\n"
    )
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
    while "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    noted.write_text("")
    subprocess.run(words, env=environment, check=True)
    codes = [run_noted(json.loads(line)) for line in noted.read_text().splitlines()]
    return max(codes)


def run_noted(words: list[str]) -> int:
    if words[0] != "-m":
        return run_python(words)
    assert words[1] == "video_attn.cli"
    return cli.main(words[2:])


def test_there_is_a_script_for_every_line() -> None:
    lines = command_lines()
    assert len(lines) == 26
    scripts = {
        word for line in lines for word in shlex.split(line) if word.endswith((".py", ".sh"))
    }
    assert {Path(script).name for script in scripts} == set(SIZES)
    for script in scripts:
        assert (ROOT / script).is_file()
        if script.endswith(".sh"):
            assert os.access(ROOT / script, os.X_OK)


def test_videos(folder: Path) -> None:
    names = {f"cogvideox-2b_{name}.mp4" for name in ATTENTION_TYPES}
    grid = {"comparison_grid.mp4"}
    assert {path.name for path in folder.glob("rendered_videos/*.mp4")} == names | grid
    assert {path.name for path in folder.glob("my_videos/*.mp4")} == names
    here = {path.name for path in folder.glob("*.mp4")}
    own = {"cogvideox-2b_sagev1.mp4", "cogvideox-2b_fav3_fp8.mp4"}
    assert here == own | grid | {"my_comparison.mp4"}


def test_captures(folder: Path) -> None:
    """Of the last capturing line: 10 at most, here 6 calls of the video transformer."""
    captures = [load_capture(path) for path in find_captures(folder / "captured_inputs")]
    assert [c.facts.call_idx for c in captures] == list(range(6))
    assert all(c.q.shape == (2, 2, 34, 16) and c.facts.kernel == "sagev1" for c in captures)
    metadata = torch.load(folder / "captured_inputs" / "sagev1_metadata.pt", weights_only=True)
    assert metadata["total_calls"] == metadata["saved_count"] == 6
    assert {path.suffix for path in find_captures(folder / "captured_inputs")} == {".pt"}


def test_the_benchmark_for_a_gpu(folder: Path, tmp_path: Path) -> None:
    """Small, and on a CPU: it leaves both tables and the picture."""
    (folder / "benchmarks").mkdir()
    shutil.copy2(ROOT / "benchmarks" / "kernel_bench_gpu.sh", folder / "benchmarks")
    words = ["bash", "benchmarks/kernel_bench_gpu.sh", str(tmp_path), *QUICK.split()]
    assert run_shell([*words, "--scale", "0.001"], folder) == 0
    for name, cases in (("bench_quantized_attention", 4), ("cogvideox_2b", 1)):
        lines = (tmp_path / f"{name}.csv").read_text().splitlines()
        assert len(lines) == 1 + cases * len(ATTENTION_TYPES)
        assert all(",ok," in line for line in lines[1:])
    assert (tmp_path / "bench_quantized_attention.png").is_file()


def test_tables(folder: Path) -> None:
    for name, cases in (
        ("bench_quantized_attention", 4),
        ("bench_quantized_attention_captured", 2),
    ):
        text = (folder / f"{name}.csv").read_text()
        assert len(text.splitlines()) == 1 + cases * len(ATTENTION_TYPES)
        assert "FAILED" not in text


@pytest.mark.parametrize("name", SIZES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The documented options are in the help of every program."""
    documented = {
        "sageattn_cogvideo.py": "model_path attention_type compile save_inputs input_dir "
        "max_captures",
        "render_all_attention.sh": "output-dir model-path stitch types help",
        "stitch_comparison.py": "input_dir output pattern font_size fps",
        "bench_cogvideo.py": "input_dir kernel",
        "bench_diffusion_attention.py": "dtype load_captured captured_dir compare_to_ref "
        "save_output output_dir",
    }  # fmt: skip
    command = {
        "sageattn_cogvideo.py": "render", "render_all_attention.sh": "compare",
        "stitch_comparison.py": "stitch",
    }.get(name, "bench-kernels")  # fmt: skip
    with contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    for option in documented.get(name, "").split():
        assert f"--{option}" in text
    if command == "bench-kernels":
        for option in ("b", "hq", "hk", "sq", "sk", "d", "dv", "causal", "metric", "o", "fp8",
                       "qk_int8", "fav3_sage", "no_k_smooth", "ref", "print_compare_stats",
                       "print_vgpr"):  # fmt: skip
            assert re.search(rf"^  -{option}\b", text, re.MULTILINE), option
