"""The Python of docs/models.md runs, its model and sizes replaced by tiny ones."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_wan import FRAMES, HEIGHT, STEPS, WIDTH, latents, tiny_wan

from video_attn.integrations.models import FAMILIES

ROOT = Path(__file__).parents[2]


def test_python_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4

    pipe = tiny_wan()
    kind: Any = type(pipe)

    class Short(kind):
        """Takes a prompt, and gives latents of a few steps."""

        def __call__(self, prompt: str = "", **options: Any) -> Any:
            if "prompt_embeds" in options:
                return super().__call__(**options)
            return SimpleNamespace(frames=latents(self, **options))

    pipe.__class__ = Short
    loader = SimpleNamespace(from_pretrained=lambda name, torch_dtype: pipe)
    monkeypatch.setattr("diffusers.WanPipeline", loader)
    names: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        for old, new in (
            ("height=768, width=1280, num_frames=69",
             f"height={HEIGHT}, width={WIDTH}, num_frames={FRAMES}"),
            ("dense_first_steps=12", "dense_first_steps=1"),
        ):  # fmt: skip
            snippet = snippet.replace(old, new)
        exec(compile(snippet, f"docs/models.md, snippet {number}", "exec"), names)
    assert names["handle"].sparse_calls == 4 * (STEPS - 1)
    assert names["schedule"].overrides[7] == "dense"


def test_each_row_of_the_table_has_a_test() -> None:
    """The tests that the page speaks of are there."""
    folder = ROOT / "tests" / "models"
    tests = "".join(path.read_text(encoding="utf-8") for path in folder.glob("test_pipelines*.py"))
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.split("## What may be done to a pipeline")[1].split("## diffusers' own")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 24
    assert tests.count("\ndef test_") >= len(rows)
    for name in re.findall(r"tests/[\w/]+\.py", table):
        assert (ROOT / name).exists()


def test_the_page_names_every_class() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        for name in family.transformers:
            assert f"`{name}`" in page
