"""The command line: commands, exit codes, `video-attn info` whole and broken, what is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_attn import cli, native, registry
from video_attn.tools import UsageError, info
from video_attn.tools.environment import VARIABLES

ROOT = Path(__file__).resolve().parents[2]


def output_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert re.search(rf"^ +{name}\s+{re.escape(command.summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: video-attn {name}")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["info", "--jso"], "--jso"),
        (["demo", "--repeats", "0"], "--repeats"),
        (["demo", "--size", "64"], "HxW"),
        (["demo", "--top-k-ratio", "1.5"], "--top-k-ratio"),
        (["demo", "--seconds", "soon"], "--seconds"),
        (["plot", "nonsense"], "nonsense"),
        (["plot", "sta", "--grid", "10x0"], "--grid"),
        (["plot", "sta", "--out", "sta.txt"], ".gif"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_command_lines(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("give less"), 2),
        (RuntimeError("no backend can serve"), 1),
        (OSError("disk full"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=["usage", "runtime", "system", "keyboard"],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert cli.main(["info"]) == code
    message = capsys.readouterr().err
    assert str(error) in message
    assert "Traceback" not in message


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m video_attn.cli info --json | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1)  # 0: the pipe took it all before head went away


# -- info -----------------------------------------------------------------------------------------


def test_info_shows_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, "info")
    for component in native.NAMES:
        assert component in text
    for backend in registry.backends():
        assert backend.name in text
    assert torch.__version__.partition("+")[0] in text
    assert "error" not in text


def test_info_prints_what_the_launcher_plans(capsys: pytest.CaptureFixture[str]) -> None:
    problem = ("1", "24", "115200", "128", "384")
    component = native.component("planning")
    if not component.loaded:
        assert cli.main(["info", "--plan", *problem]) == 1
        assert str(component.reason) in capsys.readouterr().err
        return
    plan = json.loads(output_of(capsys, "info", "--json", "--plan", *problem))
    assert plan["tiles"] == 24 * 900 and plan["blocks"] == 132
    text = output_of(capsys, "info", "--plan", *problem)
    assert len(text.splitlines()) == 1 + len(plan)
    assert f"{plan['shared_bytes']:,}" in text


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (("1", "24", "115200", "128", "100"), "block_size must be a multiple of 64, got 100"),
        (("1", "0", "115200", "128", "64"), "heads must be at least 1, got 0"),
    ],
)
def test_plans_that_are_refused(problem, message, capsys: pytest.CaptureFixture[str]) -> None:
    if not native.component("planning").loaded:
        pytest.skip(str(native.component("planning").reason))
    assert cli.main(["info", "--plan", *problem]) == 2
    assert message in capsys.readouterr().err


def test_info_agrees_with_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(output_of(capsys, "info", "--json"))
    assert list(facts) == [
        "versions", "devices", "components", "backends", "choices", "attention types",
        "environment",
    ]  # fmt: skip
    assert [row["backend"] for row in facts["backends"]] == [b.name for b in registry.backends()]
    problems = dict(info.typical_problems())
    assert [row["problem"] for row in facts["choices"]] == list(problems)
    for row in facts["choices"]:
        verdicts = registry.why_not(problems[row["problem"]])
        assert row["backend"] == next((v.backend for v in verdicts if v.chosen), "none")
        refused = [v for v in verdicts if v.reason is not None]
        assert len(row["why not the others"]) == len(refused)
        for verdict, line in zip(refused, row["why not the others"], strict=True):
            assert line == f"{verdict.backend}: {verdict.reason}"


def test_info_says_what_a_forced_backend_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(registry.BACKEND_VARIABLE, "reference")
    facts = json.loads(output_of(capsys, "info", "--json"))
    assert {row["backend"] for row in facts["choices"]} == {"reference (forced)"}
    monkeypatch.setenv(registry.BACKEND_VARIABLE, "warp_drive")
    facts = json.loads(output_of(capsys, "info", "--json"))
    assert all("warp_drive" in row["backend"] for row in facts["choices"])
    values = {row["name"]: row["value"] for row in facts["environment"]}
    assert values[registry.BACKEND_VARIABLE] == "warp_drive"


@pytest.mark.parametrize(
    ("broken", "section"),
    [
        ("video_attn.native.components", "components"),
        ("video_attn.registry.backends", "backends"),
        ("video_attn.registry.why_not", "choices"),
        ("torch.cuda.is_available", "devices"),
        ("video_attn.tools.info.platform.python_version", "versions"),
    ],
)
def test_info_never_fails(
    broken: str,
    section: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise ImportError("libnothing.so.1: cannot open shared object file")

    monkeypatch.setattr(broken, fail)
    facts = json.loads(output_of(capsys, "info", "--json"))
    assert "libnothing.so.1" in json.dumps(facts[section])
    healthy = {"versions", "devices", "components", "backends", "choices"} - {section}
    if broken == "torch.cuda.is_available":
        healthy.discard("choices")  # it asks for the devices too
    if broken == "video_attn.registry.backends":
        healthy.discard("choices")
    for name in healthy:
        assert "libnothing" not in json.dumps(facts[name])
    assert "libnothing.so.1" in output_of(capsys, "info")


def test_info_without_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    text = output_of(capsys, "info")
    assert json.loads(text[text.index("{") :])["backends"]


# -- environment variables ------------------------------------------------------------------------


def test_every_variable_is_in_the_table() -> None:
    """Whatever the sources read stands in the table, and nothing else does."""
    read = set()
    for folder, suffixes in (("python", (".py",)), ("tools", (".py",)), ("csrc", (".cpp", ".h"))):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes and path.name != "environment.py":
                text = path.read_text(encoding="utf-8")
                read |= set(re.findall(r"(?:environ(?:ment)?\.get\(|getenv\()\s*\"(\w+)\"", text))
                read |= set(re.findall(r"environ\[\"(\w+)\"\]", text))
                read |= set(re.findall(r"_VARIABLE = \"(\w+)\"", text))
    listed = {variable.name for variable in VARIABLES}
    foreign = {"TRITON_INTERPRET", "TRITON_CACHE_DIR", "OMP_NUM_THREADS"}  # of Triton and torch
    assert read - listed == set(), "read, but not in tools/environment.py"
    assert listed - read - foreign == set(), "in tools/environment.py, but read by nobody"


# -- imports --------------------------------------------------------------------------------------


def modules_after(*imports: str) -> set[str]:
    """Top-level modules that ``imports`` load beyond those of torch, in a fresh interpreter."""
    code = (
        "import json, sys, torch; before = set(sys.modules); "
        + "; ".join(imports)
        + "; assert not torch.cuda.is_initialized()"
        + "; print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"triton", "matplotlib", "rich", "av", "PIL", "pydantic", "diffusers", "transformers"}


def test_import_is_light() -> None:
    """``import video_attn`` loads no Triton and no picture library, and touches no GPU."""
    assert modules_after("import video_attn") & HEAVY == set()


def test_the_command_line_imports_only_what_it_runs() -> None:
    plain = "import video_attn.cli as c"
    assert modules_after(plain) & HEAVY == set()
    help_ = "import contextlib\nwith contextlib.suppress(SystemExit): c.main(['--help'])"
    assert modules_after(plain, f"exec({help_!r})") & HEAVY == set()
    assert modules_after(plain, "c.main(['info', '--json'])") & {"matplotlib", "av", "PIL"} == set()


@pytest.mark.parametrize(
    ("words", "module", "package"),
    [
        (["check", "--quick"], "rich", "rich"),
        (["plot", "sta", "--out", "sta.gif"], "matplotlib", "matplotlib"),
    ],
)  # fmt: skip
def test_what_the_extra_brings_is_named(
    words: list[str], module: str, package: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """Without the extra [cli] a command says which package it lacks; info works all the same."""
    monkeypatch.chdir(tmp_path)
    ours = [name for name in sys.modules if name.startswith("video_attn.tools.")]
    for name in [*ours, *(n for n in sys.modules if n.partition(".")[0] == module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert f"video-attn {words[0]} needs {package}" in error and "video-attn[cli]" in error
    assert cli.main(["info", "--json"]) == 0


def test_the_extra_holds_what_the_command_line_imports() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^cli = \[(.*)\]$", project, re.MULTILINE)
    assert extra is not None
    assert set(re.findall(r'"(\w+)', extra[1])) == set(cli.EXTRA_CLI.values())
    required = project.partition("dependencies = [")[2].partition("]")[0]
    assert not any(f'"{package}' in required for package in cli.EXTRA_CLI.values())
