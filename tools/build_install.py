"""`python setup*.py install`, done by pip.

setuptools' own `install` writes metadata beside that of an earlier `pip install`, and pip then has
to be asked twice to uninstall. One installer keeps one entry, whatever the order of the installs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

from build_checks import BuildError
from build_plan import COMPONENTS, ROOT
from build_record import format_table, read_records
from setuptools.command.install import install

PACKAGE = "video_attn"
PASSED_ON = {"user", "prefix"}  # options of `install` that pip has as well


class PipInstall(install):
    """Install with pip, with the components of the setup file and those installed before.

    pip removes the previous install first, so that without the second half `setup_vsa.py install`
    would take away what `setup_sta.py install` had built.
    """

    components: tuple[str, ...] = ()

    def initialize_options(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*setup.py install is deprecated")
            super().initialize_options()

    def run(self) -> None:
        if self.single_version_externally_managed:  # bdist_wheel collecting files, or --root
            super().run()
            return
        command = pip_command(self.distribution.get_option_dict("install"))
        kept = [name for name in COMPONENTS if name in installed_components()]
        wanted = tuple(dict.fromkeys([*self.components, *kept]))
        environment = {**os.environ, "VIDEO_ATTN_COMPONENTS": ",".join(wanted)}
        print("running", " ".join(command), f"with components {', '.join(wanted)}", flush=True)
        if subprocess.run(command, env=environment).returncode:
            raise BuildError("pip could not install video-attn; its own message is above")
        folder = installed_package()
        if folder is not None:
            print("\n" + format_table(read_records(folder)))


def pip_command(options: dict[str, tuple[str, str]]) -> list[str]:
    """The pip command for the options given to `install`.

    Raises:
        BuildError: there is no pip, or an option that pip does not have.
    """
    if importlib.util.find_spec("pip") is None:
        raise BuildError(
            "`setup.py install` works through pip, which this Python lacks; run "
            "`python -m ensurepip`, or install with `uv pip install --no-build-isolation .`"
        )
    given = {name: value for name, (source, value) in options.items() if source == "command line"}
    unknown = sorted(set(given) - PASSED_ON)
    if unknown:
        names = ", ".join("--" + name.replace("_", "-") for name in unknown)
        raise BuildError(
            f"`setup.py install` does not know {names}; it takes --user and --prefix, and "
            "`pip install --no-build-isolation .` takes all of pip's options"
        )
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation"]
    if "user" in given:
        command.append("--user")
    if "prefix" in given:
        command += ["--prefix", str(given["prefix"])]
    return [*command, str(ROOT)]


def installed_package() -> Path | None:
    """The folder of the installed package, asked from a fresh interpreter: installs change it."""
    question = (
        "import importlib.util as u; spec = u.find_spec('video_attn'); "
        "print(spec.submodule_search_locations[0] if spec else '')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, check=True
    ).stdout.strip()
    return Path(answer) if answer else None


def installed_components() -> set[str]:
    """The components that the present install has."""
    folder = installed_package()
    if folder is None:
        return set()
    return {record["component"] for record in read_records(folder) if record["built"]}
