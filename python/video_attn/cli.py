"""``video-attn``: the command line.

It knows its commands by name and imports the one that is asked for. A command is a module with
``add_arguments(parser)`` and ``run(args) -> exit code``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, cast

from . import __version__
from .tools import UsageError


class _Command(NamedTuple):
    module: str  # below video_attn
    summary: str


COMMANDS = {
    "info": _Command("tools.info", "what this install can run, and why not the rest"),
    "check": _Command("tools.check.command", "small problems on every backend, right or wrong"),
    "demo": _Command("tools.demo.command", "dense and sparse attention on a real video clip"),
    "plot": _Command("tools.plot.command", "pictures of the patterns"),
    "tokens": _Command("tools.token_table", "tokens and VSA tiles of a video in a model"),
    "render": _Command("tools.render.command", "a video with one attention type, q, k, v captured"),
    "compare": _Command("tools.render.compare", "the same video with every attention type"),
    "bench-kernels": _Command(
        "tools.kernel_bench.command", "attention kernels on random or captured q, k, v"
    ),
    "calibrate": _Command(
        "tools.calibrate.command", "the cheapest attention per head within an error budget"
    ),
    "quality": _Command(
        "tools.quality.command", "PSNR, SSIM and LPIPS of videos against a reference"
    ),
    "capture-info": _Command("tools.capture.command", "what a folder of captures holds"),
    "warmup": _Command("tools.warmup", "compile the Triton kernels that a model will need"),
    "stitch": _Command("tools.stitch.command", "videos side by side, in one video with labels"),
}


# Modules of the extra [cli] -> packages.
EXTRA_CLI = {"av": "av", "matplotlib": "matplotlib", "PIL": "pillow", "rich": "rich"}


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of the ``chosen`` command only: the others are not imported."""
    parser = argparse.ArgumentParser(
        prog="video-attn",
        description="Sparse attention for video models.",
        epilog="video-attn COMMAND --help shows the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"video-attn {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            allow_abbrev=False,
        )
        if name == chosen:
            module = import_module(f".{command.module}", __package__)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run, parser=subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    0 is success, 1 something that failed while running, 2 a wrong command line (for which argparse
    raises SystemExit), 130 an interrupt from the keyboard.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    try:
        return _run(argv, chosen)
    except ModuleNotFoundError as error:
        package = EXTRA_CLI.get(str(error.name).partition(".")[0])
        if package is None:
            raise
        print(
            f"video-attn {chosen} needs {package}, which is not installed: "
            "pip install 'video-attn[cli]'",
            file=sys.stderr,
        )
        return 1


def _run(argv: list[str], chosen: str | None) -> int:
    args = _parser(chosen).parse_args(argv)
    try:
        return cast("Callable[[argparse.Namespace], int]", args.run)(args)
    except UsageError as error:
        args.parser.print_usage(sys.stderr)
        return _failure(args, error, 2)
    except BrokenPipeError:  # the reader went away, as `video-attn info | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError) as error:  # a file, a codec, a backend that cannot serve
        return _failure(args, error, 1)
    except KeyboardInterrupt:
        return 130


def _failure(args: argparse.Namespace, error: Exception, code: int) -> int:
    print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
