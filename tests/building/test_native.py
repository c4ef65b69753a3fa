"""Loading of compiled components: what is refused, what is said, and that nothing raises."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from video_attn import native

VERSION = "1.2.3"
TORCH = "2.13.0+cpu"


def put(folder: Path, name: str = "cpu", library: bytes | None = b"not a library", **changes):
    """A component of one's own in `folder`: a file that is no library, and a fitting record."""
    record = {"component": name, "built": True, "reason": None, "version": VERSION, "torch": TORCH}
    (folder / f"_{name}.json").write_text(json.dumps({**record, **changes}))
    if library is not None:
        (folder / f"_{name}.so").write_bytes(library)


def load(
    folder: Path, name: str = "cpu", torch_version: str = TORCH, version: str | None = VERSION
):
    return native.load_component(name, folder, torch_version, version)


def test_not_part_of_the_install(tmp_path):
    found = load(tmp_path)
    assert (found.loaded, dict(found.record)) == (False, {})
    assert "cpu is not part of this install" in found.reason
    assert (
        "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps ."
        in found.reason
    )


def test_library_without_record(tmp_path):
    (tmp_path / "_cpu.so").write_bytes(b"")
    assert "has no build record" in load(tmp_path).reason


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "\x00"])
def test_broken_record(tmp_path, text):
    (tmp_path / "_cpu.json").write_text(text)
    (tmp_path / "_cpu.so").write_bytes(b"")
    found = load(tmp_path)
    assert not found.loaded
    assert "record of component cpu cannot be read" in found.reason


def test_record_that_is_a_folder(tmp_path):
    (tmp_path / "_cpu.json").mkdir()
    assert "cannot be read" in load(tmp_path).reason


def test_reason_of_the_build_is_passed_on(tmp_path):
    put(tmp_path, library=None, built=False, reason="nvcc not found; install it")
    found = load(tmp_path)
    assert found.reason == "component cpu was not built: nvcc not found; install it"
    assert found.record["version"] == VERSION


def test_missing_library(tmp_path):
    put(tmp_path, library=None)
    assert "_cpu.so is missing" in load(tmp_path).reason


def test_other_package_version(tmp_path):
    put(tmp_path, version="1.2.2")
    reason = load(tmp_path).reason
    assert "built for video-attn 1.2.2, this is 1.2.3; rebuild" in reason


def test_source_tree_without_version_is_not_refused_for_it(tmp_path):
    put(tmp_path, version="1.2.2")
    assert "cannot be loaded" in load(tmp_path, version=None).reason


@pytest.mark.parametrize("other", ["2.12.1+cpu", "2.14.0", "3.13.0", "2.1.0"])
def test_cpu_component_of_another_torch(tmp_path, other):
    put(tmp_path)
    reason = load(tmp_path, torch_version=other).reason
    assert f"built for torch {TORCH}, this is torch {other}; rebuild" in reason


@pytest.mark.parametrize("other", ["2.13.0", "2.13.1+cu130", "2.13.0a0+git123"])
def test_same_minor_version_of_torch_fits(tmp_path, other):
    put(tmp_path)
    assert "cannot be loaded" in load(tmp_path, torch_version=other).reason


def test_stable_abi_component_serves_other_torch_versions(tmp_path):
    put(tmp_path, name="sta")
    assert "cannot be loaded" in load(tmp_path, name="sta", torch_version="2.14.0").reason


def test_text_of_the_loader_is_kept(tmp_path):
    put(tmp_path, library=b"not a library")
    found = load(tmp_path)
    assert not found.loaded
    assert "_cpu.so cannot be loaded" in found.reason
    assert "file too short" in found.reason  # the words of the system's loader


def test_component_is_cached_and_immutable():
    found = native.component("cpu")
    assert found is native.component("cpu")
    assert found.loaded == (found.reason is None)
    with pytest.raises(TypeError):
        found.record["version"] = "0"


def test_components_are_all_listed_in_order():
    listed = native.components()
    assert tuple(item.name for item in listed) == native.NAMES
    assert all(item.loaded or item.reason for item in listed)


@pytest.mark.parametrize("name", ["", "CPU", "hopper", None])
def test_unknown_component(name):
    with pytest.raises(ValueError, match="name must be one of cpu, sta, vsa, sage, planning; got"):
        native.component(name)


def test_names_are_those_of_the_build():
    from build_plan import COMPONENTS

    assert tuple(COMPONENTS) == native.NAMES


def test_built_component_of_this_tree_fits_the_running_torch():
    """The CPU component is built wherever the tests are meant to run in full."""
    found = native.component("cpu")
    if found.record and not found.record["built"]:
        pytest.skip(found.reason)
    assert found.loaded, found.reason
    assert found.record["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert "DEFAULT" in found.record["architectures"]


def test_no_instruction_of_a_better_cpu_outside_its_kernels():
    """Otherwise the library would die of an illegal instruction on an older machine."""
    found, disassembler = native.component("cpu"), shutil.which("objdump")
    if not found.loaded or "AVX512" not in found.record["architectures"] or not disassembler:
        pytest.skip("needs objdump and a CPU component for x86")
    library = Path(native.__file__).parent / "_cpu.so"
    listing = subprocess.run(
        [disassembler, "-d", "--demangle", "--no-show-raw-insn", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    counted = {"AVX512": 0, "AVX2": 0, "": 0}  # functions with vector instructions, by namespace
    leaked = set()
    for function in listing.split("\n\n"):
        name, _, body = function.partition("\n")
        if re.search(r":\tv[a-z]", body):
            capability = next(known for known in counted if known in name)
            counted[capability] += 1
            if not capability or (capability == "AVX2" and "%zmm" in body):
                leaked.add(name)
    assert counted["AVX512"] and counted["AVX2"], "the search finds what it looks for"
    assert not leaked


def test_import_loads_no_component():
    """Only the first use loads a library: `import video_attn` stays cheap."""
    program = (
        "import video_attn.native as n, pathlib; "
        "maps = pathlib.Path('/proc/self/maps').read_text(); "
        "print([x for x in n.NAMES if f'/_{x}.so' in maps])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout.strip()) == (0, "[]"), answer.stderr
