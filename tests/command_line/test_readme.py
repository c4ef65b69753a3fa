"""What the README says is true: its code runs, its commands exist, its tables are current."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_summary
import pytest
import readme_tables
import torch

from video_attn import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/backends.md", "docs/benchmarks.md",
    "docs/calibrate.md", "docs/compare.md", "docs/design.md", "docs/install.md",
    "docs/quantized.md", "docs/radial.md", "docs/sparsify.md", "docs/sta.md",
)  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
QUANTIZED = (ROOT / "docs" / "quantized.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


pytestmark = pytest.mark.usefixtures("on_quick_backend")


# -- Python ---------------------------------------------------------------------------------------


def test_the_documented_call_of_st_attn() -> None:
    """The snippet of the original, to the letter, at its full 30 x 48 x 80 tokens."""
    snippet = next(block for block in blocks(README, "python") if "(30, 48, 80)" in block)
    *before, with_text, without_text = ast.parse(snippet).body
    video = 30 * 48 * 80
    names: dict[str, Any] = {"window_size": [(1, 1, 1), (2, 1, 2)], "text_length": 200}
    run(before, names)
    names |= {name: torch.randn(1, 2, video + 256, 8) for name in "qkv"}
    run([with_text], names)
    assert names["out"].shape == (1, 2, video + 256, 8)
    assert names["out"][:, :, video + 200 :].eq(0).all()
    assert names["out"][:, :, : video + 200].ne(0).any(-1).all()
    names |= {name: torch.randn(1, 2, video, 8) for name in "qkv"}
    run([without_text], names)
    assert names["out"].shape == (1, 2, video, 8)


def run(statements: list[ast.stmt], names: dict[str, Any]) -> None:
    exec(compile(ast.Module(statements, []), "README.md", "exec"), names)


OWN_SNIPPETS = [
    block for block in blocks(README + QUANTIZED, "python") if "(30, 48, 80)" not in block
]


@pytest.mark.parametrize("snippet", OWN_SNIPPETS, ids=range(len(OWN_SNIPPETS)))
def test_snippets_run(snippet: str) -> None:
    names: dict[str, Any] = {}
    if "apply(pipe" in snippet:
        pytest.importorskip("diffusers")
        from tiny_wan import tiny_wan

        names["pipe"] = tiny_wan()
    run(ast.parse(snippet).body, names)
    if "handle" in names:
        if "presets" in names:
            assert names["handle"].precision == "sage_fp8"
        names["handle"].undo()
        return
    out = names["out"]
    assert out.isfinite().all()
    assert out.shape == names["q"].shape
    if names["q"].requires_grad:
        assert names["q"].grad.isfinite().all()


def test_there_are_snippets_of_every_import_path() -> None:
    text = "".join(blocks(README, "python"))
    for module in ("st_attn", "vsa", "video_attn"):
        assert re.search(rf"^(import|from) {module}\b", text, re.MULTILINE)


# -- shell ----------------------------------------------------------------------------------------

# What is not ours: said in the original's installation notes, and not run here.
FOREIGN = ("sudo apt ", "sudo update-alternatives ", "export ", "git submodule update ")


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks((ROOT / page).read_text(encoding="utf-8"), "bash"):
            lines = (line.partition("#")[0].strip() for line in block.splitlines())
            found += [(page, line) for line in lines if line]
    return found


@pytest.mark.parametrize(
    ("page", "command"), commands(), ids=[f"{page}: {line}" for page, line in commands()]
)
def test_commands_are_real(page: str, command: str) -> None:
    """Options parse, scripts and make targets exist."""
    if command.startswith(FOREIGN):
        return
    program, *words = shlex.split(command)
    if program == "video-attn":
        chosen = words[0]
        args = cli._parser(chosen).parse_args(words)
        assert args.run is not None
    elif program == "make":
        target = words[0]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make target {target}"
    elif program == "python" and not words[0].startswith("-"):
        source = ROOT / words[0]
        compile(source.read_text(encoding="utf-8"), str(source), "exec")
    elif program == "bash":
        assert subprocess.run(["bash", "-n", words[0]], cwd=ROOT, check=False).returncode == 0
    else:
        pytest.fail(f"{page} shows a command that nobody checks: {command}")


def test_the_two_commands_come_first() -> None:
    first = next(block for block in blocks(README, "bash"))
    assert [line.split()[:2] for line in first.splitlines()] == [["make", "demo"], ["make", "test"]]
    assert README.index("make demo") < 400


# -- tables, links, pictures ----------------------------------------------------------------------


@pytest.fixture
def compiled_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are about machines, not about Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.mark.parametrize("name", readme_tables.TABLES)
@pytest.mark.usefixtures("compiled_triton")
def test_tables_are_current(name: str) -> None:
    """Every table stands somewhere, as the script would write it now."""
    if name in ("benchmarks", "gpu", "models", "calibrate") and new_records():
        pytest.skip(f"records that are not committed yet: {new_records()}")
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in readme_tables.FILES]
    found = [text for page in pages for text in re.findall(table_pattern(name), page, re.DOTALL)]
    assert found == [readme_tables.TABLES[name]()], "run: python tools/readme_tables.py"


def table_pattern(name: str) -> str:
    return rf"<!-- table: {name} -->\n(.*?)<!-- end of table -->"


def new_records() -> str:
    """Records of this machine, which the README does not show: `make bench` writes them."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "benchmarks/results"]
    done = subprocess.run(command, capture_output=True, text=True)
    return " ".join(line.split()[-1] for line in done.stdout.splitlines())


@pytest.mark.usefixtures("compiled_triton")
def test_a_stale_table_is_seen() -> None:
    stale = INSTALL.replace("| forces that backend", "| does nothing")
    assert stale != INSTALL
    [table] = re.findall(table_pattern("environment"), readme_tables.updated(stale), re.DOTALL)
    assert table == readme_tables.environment_table()


def test_records_become_tables() -> None:
    """What all rows share is said once; what differs has a column; figures are the record's."""

    def result(direction: str, provider: str, ms: float, tflops: float) -> dict[str, Any]:
        return {
            "problem": {"heads": 4, "grid": [2, 3, 4], "pass": direction}, "provider": provider,
            "p20_ms": ms - 1, "median_ms": ms, "p80_ms": ms + 1, "metrics": {"tflops": tflops},
        }  # fmt: skip

    text = readme_tables.record_table({
        "benchmark": "bench_x", "date": "2026-01-02T03:04:05", "commit": "abc",
        "machine": {"cpu": "Chip", "threads": 2}, "versions": {"torch": "2.13.0"},
        "results": [result("forward", "us", 10, 0.5), result("backward", "them", 20, 0.25)],
    })  # fmt: skip
    caption, _, header, _, first, second = text.splitlines()
    assert caption == (
        "`bench_x` on Chip, 2 threads (2026-01-02, commit abc, torch 2.13.0): heads 4, grid 2×3×4."
    )
    assert cells(header) == ["pass", "by", "median ms (p20 to p80)", "tflops"]
    assert cells(first) == ["forward", "us", "10 (9 to 11)", "0.5"]
    assert cells(second) == ["backward", "them", "20 (19 to 21)", "0.25"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets or page.startswith("docs/")
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        other = (ROOT / page).parent / path if path else ROOT / page
        assert other.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page}: no heading for {target}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_picture_of_the_records_is_current() -> None:
    """It keeps a fingerprint of the figures it shows."""
    from PIL import Image

    if new_records():
        pytest.skip(f"records that are not committed yet: {new_records()}")
    with Image.open(benchmark_summary.PICTURE) as picture:
        shown = picture.text["records"]
    assert shown == benchmark_summary.fingerprint(), "run: python tools/benchmark_summary.py"


def test_the_picture_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark_summary.draw(tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 10_000
    fingerprint = benchmark_summary.fingerprint()
    faster = [replace(p, bars=(replace(p.bars[0], milliseconds=1.0), *p.bars[1:]))
              for p in benchmark_summary.panels()]  # fmt: skip
    monkeypatch.setattr(benchmark_summary, "panels", lambda: faster)
    assert benchmark_summary.fingerprint() != fingerprint


def test_pictures_are_small() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 600_000, picture.name


@pytest.mark.parametrize("name", ["sta.gif", "sta_blocks.png"])
def test_pictures_are_those_of_the_command(name: str, tmp_path: Path) -> None:
    """The page's command draws the page's picture, but for the fonts of another release."""
    from PIL import Image

    line = next(
        c for page, c in commands() if page == "docs/sta.md" and c.endswith(f"--out {name}")
    )
    words = [*shlex.split(line)[1:-1], str(tmp_path / name)]
    assert cli.main(words) == 0
    with Image.open(ROOT / "docs" / "images" / name) as old, Image.open(tmp_path / name) as new:
        assert old.size == new.size
        assert getattr(old, "n_frames", 1) == getattr(new, "n_frames", 1)
        for index in range(0, getattr(old, "n_frames", 1), 6):
            for image in (old, new):
                image.seek(index)
            pairs = zip(
                old.convert("RGB").resize((50, 28)).tobytes(),
                new.convert("RGB").resize((50, 28)).tobytes(),
                strict=True,
            )
            assert max(abs(a - b) for a, b in pairs) < 40


def test_the_oldest_python_is_the_one_of_the_package() -> None:
    needed = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert needed and f"Python {needed[1]} or newer" in README
