"""``video-attn plot NAME``: pictures of the patterns.

A picture is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``; the first line
of its docstring, after "plot NAME: ", is its summary.
"""

from __future__ import annotations

import argparse

from . import radial, scene, sta, sta_blocks

PLOTS = {
    "sta": sta,
    "sta-blocks": sta_blocks,
    "radial": radial,
    "scene": scene,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per picture; its summary is the first line of its module's docstring."""
    subparsers = parser.add_subparsers(title="pictures", metavar="NAME", required=True)
    for name, module in PLOTS.items():
        summary = (module.__doc__ or "").splitlines()[0].split(": ", 1)[1]
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:], allow_abbrev=False
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run_plot=module.run, parser=subparser)


def run(args: argparse.Namespace) -> int:
    """Draws the chosen picture."""
    return int(args.run_plot(args))
