"""What every benchmark needs: fair timing, a record with its circumstances, a table.

A benchmark checks its results first (:func:`require_correct`), times all peers in turn in the same
run (:func:`time_interleaved`), prints a table and writes one JSON record
(:func:`write_record`) that says on which machine, with which versions and from which commit.
"""

from __future__ import annotations

from .check import WrongResultError, relative_error, require_correct
from .progress import elapsed, say
from .record import (
    Record,
    Result,
    commit,
    machine_info,
    print_table,
    record_path,
    versions,
    write_record,
)
from .timing import Timing, time_interleaved

__all__ = [
    "Record",
    "Result",
    "Timing",
    "WrongResultError",
    "commit",
    "elapsed",
    "machine_info",
    "print_table",
    "record_path",
    "relative_error",
    "require_correct",
    "say",
    "time_interleaved",
    "versions",
    "write_record",
]
