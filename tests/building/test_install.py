"""Every way of installing after every other way, in fresh environments (slow: `make test-all`).

The sources of the CPU component are replaced by a few lines, so that minutes go into installing
and not into compiling the same kernels again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from build_tree import CPU_SOURCE, copy_tree, put_source

pytestmark = pytest.mark.slow

NO_ISOLATION = ("-m", "pip", "install", "--no-build-isolation")
WAYS = {
    "setup.py": ("setup.py", "install"),
    "setup_sta.py": ("setup_sta.py", "install"),
    "setup_vsa.py": ("setup_vsa.py", "install"),
    "pip": (*NO_ISOLATION, "."),
    "pip -e": (*NO_ISOLATION, "-e", "."),
}
COMPONENTS = {"setup_sta.py": {"cpu", "sta"}, "setup_vsa.py": {"cpu", "vsa"}}
QUESTION = """
import json, pathlib, torch
from importlib.metadata import distributions
from importlib.util import find_spec
folder = pathlib.Path(find_spec("video_attn").submodule_search_locations[0])
torch.ops.load_library(str(folder / "_cpu.so"))
print(json.dumps({
    "folder": str(folder),
    "entries": [str(d._path) for d in distributions(name="video-attn")],
    "components": sorted(p.stem[1:] for p in folder.glob("_*.json")),
    "answer": torch.ops.video_attn_stand_in.answer(),
}))
"""


def walk(ways: Sequence[str]) -> Iterator[str]:
    """A way through all ordered pairs, each way after itself included: n * n + 1 steps."""
    for index, way in enumerate(ways):
        yield way
        for later in ways[index + 1 :]:
            yield from (way, later)
    yield ways[0]


def test_walk_takes_every_pair_once():
    steps = list(walk("abcde"))
    assert sorted(itertools.pairwise(steps)) == [(x, y) for x in "abcde" for y in "abcde"]


class Environment:
    """A virtual environment with its own setuptools and pip, which borrows the rest from ours."""

    def __init__(self, folder: Path, installers: Sequence[str]) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        self.python = folder / "bin" / "python"
        self.site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        self.run("-m", "pip", "install", "-q", "--upgrade", *installers)
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        own = (
            "pip",
            "setuptools",
            "pkg_resources",
            "_distutils_hack",
            "video_attn",
            "__editable__",
        )
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.startswith(own) and path.suffix != ".pth":
                (borrowed / path.name).symlink_to(path)
        (self.site / "borrowed.pth").write_text(f"{borrowed}\n")
        self.clean = self.files()

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        # cmake and ninja may stand beside our own Python, which this environment does not see.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        surroundings = {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}
        done = subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env={**surroundings, "PATH": path, "VIDEO_ATTN_BUILD_EXT": "auto"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def ask(self, program: str) -> str:
        return self.run("-c", program, cwd=Path("/")).strip()

    def files(self) -> set[Path]:
        """What stands in site-packages and beside the interpreter, caches of imports apart."""
        found = [*self.site.iterdir(), *self.python.parent.iterdir()]
        return {path for path in found if path.name != "__pycache__"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = copy_tree(tmp_path_factory.mktemp("install"))
    shutil.rmtree(tree / "csrc", ignore_errors=True)
    put_source(tree, "cpu/stand_in.cpp", CPU_SOURCE)
    return tree


@pytest.fixture(scope="module", params=["setuptools==77.0.3", "setuptools==80.9.0", "newest"])
def environment(request, tmp_path_factory):
    """Two older versions of setuptools with the pip that Python brings, and the newest of both."""
    installers = ["setuptools", "pip"] if request.param == "newest" else [request.param]
    return Environment(tmp_path_factory.mktemp("environment") / "venv", installers)


def check_installed(environment: Environment, tree: Path, way: str) -> None:
    """One entry, in the right place, with the components of the way, and it runs."""
    answer = json.loads(environment.ask(QUESTION))
    site = environment.site if way != "pip -e" else tree / "python"
    assert answer["folder"] == str(site / "video_attn")
    assert answer["answer"] == 42
    inside = [path for path in answer["entries"] if path.startswith(str(environment.site))]
    assert len(inside) == 1 and inside[0].endswith(".dist-info"), answer["entries"]
    wanted = COMPONENTS.get(way, {"cpu", "sta", "vsa", "sage", "planning"})
    if way != "pip -e":  # a source tree keeps the records of earlier builds
        assert set(answer["components"]) == wanted
    assert (environment.python.parent / "video-attn").is_file()


def uninstall(environment: Environment) -> None:
    """One `pip uninstall` leaves the environment as it was."""
    environment.run("-m", "pip", "uninstall", "-y", "video-attn")
    assert environment.files() == environment.clean
    assert environment.ask("import importlib.util as u; print(u.find_spec('video_attn'))") == "None"


def test_every_way_after_every_other(environment, tree):
    for way in walk(tuple(WAYS)):
        environment.run(*WAYS[way], cwd=tree)
        check_installed(environment, tree, way)
    uninstall(environment)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_alone(environment, tree, way):
    environment.run(*WAYS[way], cwd=tree)
    check_installed(environment, tree, way)
    uninstall(environment)


def test_install_ends_with_the_table(environment, tree):
    output = environment.run("setup_sta.py", "install", cwd=tree)
    uninstall(environment)
    last = output.rstrip().splitlines()[-4:]
    assert last[0] == "native components of video-attn"
    assert last[2].split()[:3] == ["cpu", "yes", "DEFAULT"]
    assert last[3].endswith("no sources in this version")


def test_single_installs_add_up(environment, tree):
    """setup_vsa.py asks for the components again that setup_sta.py had built."""
    environment.run("setup_sta.py", "install", cwd=tree)
    record = environment.site / "video_attn" / "_sta.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "built": True}))
    output = environment.run("setup_vsa.py", "install", cwd=tree)
    assert "with components cpu, vsa, sta" in output
    assert record.is_file()
    uninstall(environment)


def test_isolated_install_goes_without_native_parts(environment, tree):
    """torch is not in an isolated build environment: the package installs, and says why."""
    environment.run("-m", "pip", "install", "--no-deps", ".", cwd=tree)
    record = json.loads((environment.site / "video_attn" / "_cpu.json").read_text())
    assert not (environment.site / "video_attn" / "_cpu.so").exists()
    uninstall(environment)
    assert record["built"] is False
    assert "pip install --no-build-isolation ." in record["reason"]
