"""tools/sanitize_hopper.py: what it makes of a tool's output, and of a tool that does not end."""

from __future__ import annotations

import sys
import time

import sanitize_hopper

OUTPUT = """\
========= COMPUTE-SANITIZER
=========
========= Barrier error detected. Divergent thread(s) in block.
=========     at kernel<(int)64>(Arguments)+0x10
=========     by thread (288,0,0) in block (4,0,0)
========= 
========= Barrier error detected. Divergent thread(s) in block.
=========     at kernel<(int)64>(Arguments)+0x10
=========     by thread (289,0,0) in block (4,0,0)
========= 
64 results of hopper
========= ERROR SUMMARY: 2 errors
"""  # noqa: W291


def test_reports_are_listed_once():
    assert sanitize_hopper.list_reports(OUTPUT) == [
        "1 x COMPUTE-SANITIZER",
        "2 x Barrier error detected. Divergent thread(s) in block. "
        "at kernel<(int)64>(Arguments)+0x10",
        "1 x ERROR SUMMARY: 2 errors",
    ]


def test_output_and_status_of_a_command():
    program = "import sys; print('found'); print('more', file=sys.stderr); sys.exit(3)"
    status, output = sanitize_hopper.run_to_end([sys.executable, "-c", program], 60)
    assert status == 3 and sorted(output.split()) == ["found", "more"]


def test_a_tool_that_does_not_end_is_ended_with_its_children():
    """The child holds the pipe: without it, reading to the end would wait for a minute."""
    child = "import time; time.sleep(60)"
    program = (
        "import subprocess, sys; print('begun', flush=True); "
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    began = time.monotonic()
    status, output = sanitize_hopper.run_to_end([sys.executable, "-c", program], 2.0)
    assert status is None and "begun".startswith(output.strip())
    assert time.monotonic() - began < 30
