"""``video-attn bench-kernels``: the options, and a benchmark from beginning to end."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...attention_types import ATTENTION_TYPES
from .. import UsageError
from ..options import file_ending_in, names, positive_float, positive_int, sizes
from .report import METRICS

# The names of the documents, and the attention types that they mean.
FLAGS = {
    "-fp8": "fav3_fp8", "-fav3_fp8": "fav3_fp8", "-qk_int8": "sagev1", "-sagev1": "sagev1",
    "-fav3_sage": "fav3_sage",
}  # fmt: skip
REFERENCES = ("torch", "qk_int8", *ATTENTION_TYPES)
DEFAULT_KERNEL = "fav2"
CAPTURED_DIR = Path("captured_inputs")
CSV_STEM = "bench_diffusion_attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``video-attn bench-kernels``, under the names of the documents."""
    _add_random(parser.add_argument_group("random inputs"))
    _add_captured(parser.add_argument_group("captured inputs"))
    _add_kernels(parser.add_argument_group(f"kernels (default: {DEFAULT_KERNEL})"))
    _add_output(parser.add_argument_group("what is shown and written"))
    _add_comparison(parser.add_argument_group("comparison"))


def _add_random(group: argparse._ArgumentGroup) -> None:
    for name, what in (
        ("b", "batch size"), ("hq", "query heads"), ("sq", "queries"),
        ("d", "head_dim of queries and keys"), ("hk", "key and value heads (default: -hq)"),
        ("sk", "keys (default: -sq)"), ("dv", "head_dim of values (default: -d)"),
    ):  # fmt: skip
        group.add_argument(f"-{name}", type=positive_int, metavar="N", help=what)
    group.add_argument(
        "--shapes", type=sizes("BxHxSxD"), nargs="+", metavar="BxHxSxD",
        help="several problems, instead of -b -hq -sq -d",
    )  # fmt: skip
    group.add_argument(
        "--scale", type=positive_float, metavar="F",
        help="multiply all lengths by this: 0.01 for a small machine",
    )  # fmt: skip
    group.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="default fp16")
    group.add_argument("-causal", action="store_true", help="causal masking")


def _add_captured(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--load_captured", action="store_true", help="take captured q, k, v")
    group.add_argument(
        "--captured_dir", "--input_dir", type=Path, metavar="DIR",
        help="folder with captures (default ./captured_inputs); --input_dir is the same",
    )  # fmt: skip
    group.add_argument(
        "--captured_layout", choices=("bhsd", "bshd"),
        help="of files that do not say it (default bhsd)",
    )  # fmt: skip
    group.add_argument("--max_inputs", type=positive_int, metavar="N", help="the first N of them")
    group.add_argument("--sample_rate", type=positive_int, metavar="N", help="every N-th of them")


def _add_kernels(group: argparse._ArgumentGroup) -> None:
    for flag, kernel in FLAGS.items():
        group.add_argument(
            flag, dest="flags", action="append_const", const=kernel,
            help=ATTENTION_TYPES[kernel].summary,
        )  # fmt: skip
    group.add_argument(
        "--kernel", type=names, metavar="A,B,...",
        help=f"several, or 'all': {', '.join(ATTENTION_TYPES)}",
    )  # fmt: skip
    group.add_argument(
        "-no_k_smooth", action="store_true", help="no K smoothing in INT8 and FP8 kernels"
    )
    group.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    group.add_argument(
        "--repeats", type=positive_int, metavar="N", help="timed calls (default: a second's worth)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-metric", choices=METRICS, default="throughput", help="what the table shows"
    )
    group.add_argument("-o", action="store_true", help=f"write {CSV_STEM}[_KERNEL].csv")
    group.add_argument(
        "--csv", type=file_ending_in((".csv",)), metavar="FILE", help="write this CSV"
    )
    group.add_argument(
        "--record", type=file_ending_in((".json",)), metavar="FILE",
        help="write this record, as those in benchmarks/results",
    )  # fmt: skip
    group.add_argument(
        "--plot", type=file_ending_in((".png",)), metavar="FILE", help="draw bars, speed and error"
    )
    group.add_argument(
        "-print_vgpr", action="store_true",
        help="registers, spills and shared memory of the compiled kernels",
    )  # fmt: skip
    group.add_argument("--save_output", action="store_true", help="save the outputs")
    group.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="where (default outputs); saves them too"
    )


def _add_comparison(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compare_to_ref", action="store_true",
        help="statistics against a reference and a verdict, before anything is timed",
    )  # fmt: skip
    group.add_argument(
        "-ref", choices=REFERENCES, metavar="NAME",
        help=f"the reference: {', '.join(REFERENCES)} (default torch: exact, in fp32)",
    )  # fmt: skip
    group.add_argument(
        "--ref-rows", type=positive_int, metavar="N",
        help="compare N query rows of each head, evenly spread (default all)",
    )  # fmt: skip
    group.add_argument(
        "-print_compare_stats", action="store_true", help="minimum, mean, ... of both outputs too"
    )


def run(args: argparse.Namespace) -> int:
    """Benchmarks; 1 if a kernel failed, or is wrong."""
    from ..bench import print_table, write_record
    from .measure import benchmark
    from .report import draw, error_table, record_of, speed_table, write_csv

    settings = _settings(args)
    cases = _cases(args)
    rows = []
    with _progress(len(cases) * (2 * len(settings.kernels) + 1)) as advance:
        for case in cases:
            rows += benchmark(case, settings, advance)
    if settings.reference is not None:
        print_table(f"error against {settings.reference}", *error_table(rows))
    for row in rows:
        if row.statistics is not None and args.print_compare_stats:
            print(f"{row.case.name} {row.kernel} against {settings.reference}:")
            print("\n".join(row.statistics.lines()))
    print_table(_title(cases, settings.device), *speed_table(rows, args.metric))
    for row in rows:
        if row.failed:
            print(f"FAILED: {row.case.name} {row.kernel}: {row.error or row.verdict}")
    if args.print_vgpr:
        _print_resources(rows, settings)
    if path := _csv_path(args, settings.kernels):
        write_csv(rows, path, settings.device)
        print(f"wrote {path}")
    if args.record is not None:
        write_record(record_of(rows, settings.device), args.record)
        print(f"wrote {args.record}")
    if args.plot is not None and any(not row.error for row in rows):
        draw(rows, args.plot)
        print(f"wrote {args.plot}")
    if settings.output_dir is not None:
        print(f"outputs are in {settings.output_dir}")
    return 1 if any(row.failed for row in rows) else 0


def _settings(args: argparse.Namespace) -> Any:
    """How to benchmark.

    Raises:
        UsageError: options that contradict each other.
    """
    from ..devices import chosen_device
    from .measure import Settings

    kernels = _kernels(args)
    quantized = [k for k in kernels if ATTENTION_TYPES[k].precision != "native"]
    if args.no_k_smooth and not quantized:
        raise UsageError(f"-no_k_smooth: {', '.join(kernels)} quantizes nothing; leave it out")
    compared = args.compare_to_ref or args.ref or args.ref_rows or args.print_compare_stats
    reference = {"qk_int8": "sagev1"}.get(args.ref, args.ref or "torch") if compared else None
    output_dir = args.output_dir or (Path("outputs") if args.save_output else None)
    return Settings(
        kernels, chosen_device(args.device), args.repeats, not args.no_k_smooth, reference,
        args.ref_rows, output_dir,
    )  # fmt: skip


def _kernels(args: argparse.Namespace) -> list[str]:
    flags = list(dict.fromkeys(args.flags or []))
    if len(flags) > 1:
        given = ", ".join(flag for flag, kernel in FLAGS.items() if kernel in flags)
        raise UsageError(f"give one of {given}, or several as --kernel {','.join(flags)}")
    if flags and args.kernel:
        raise UsageError("give --kernel or a kernel's own flag, not both")
    kernels = flags or args.kernel or [DEFAULT_KERNEL]
    if kernels == ["all"]:
        return list(ATTENTION_TYPES)
    for kernel in kernels:
        if kernel not in ATTENTION_TYPES:
            raise UsageError(f"--kernel: {kernel!r} is none of {', '.join(ATTENTION_TYPES)}, all")
    return list(dict.fromkeys(kernels))


def _cases(args: argparse.Namespace) -> list[Any]:
    """The inputs.

    Raises:
        UsageError: sizes are missing, do not fit together, or come with captures.
    """
    from .cases import DTYPES, Sizes, captured_cases, check_sizes, random_case

    single = {n: getattr(args, n) for n in ("b", "hq", "sq", "d", "hk", "sk", "dv")}
    given = [f"-{name}" for name, value in single.items() if value is not None]
    given += ["--shapes"] if args.shapes else []
    if args.load_captured:
        given += [f"--{n}" for n in ("scale", "dtype") if getattr(args, n) is not None]
        if given:
            raise UsageError(f"--load_captured: captures have their own {', '.join(given)}")
        folder = args.captured_dir or CAPTURED_DIR
        return captured_cases(
            folder, args.captured_layout, args.causal, args.max_inputs, args.sample_rate or 1
        )
    for name in ("captured_dir", "captured_layout", "max_inputs", "sample_rate"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} is for captured inputs; add --load_captured")
    dtype = DTYPES[args.dtype or "fp16"]
    if args.shapes:
        if given != ["--shapes"]:
            raise UsageError(f"give --shapes or {', '.join(given[:-1])}, not both")
        found = [Sizes(b, h, h, s, s, d, d) for b, h, s, d in args.shapes]
    else:
        b, hq, sq, d = check_sizes(
            ("-b", "-hq", "-sq", "-d"), [single[n] for n in ("b", "hq", "sq", "d")]
        )
        found = [Sizes(b, hq, args.hk or hq, sq, args.sk or sq, d, args.dv or d)]
    if found[0].heads % found[0].kv_heads:
        raise UsageError(f"-hq {found[0].heads} must be a multiple of -hk {found[0].kv_heads}")
    scaled = [_scaled(x, args.scale or 1.0) for x in found]
    return [random_case(x, dtype, args.causal) for x in scaled]


def _scaled(x: Any, factor: float) -> Any:
    from dataclasses import replace

    lengths = (max(1, math.ceil(n * factor)) for n in (x.q_len, x.kv_len))
    return replace(x, **dict(zip(("q_len", "kv_len"), lengths, strict=True)))


def _csv_path(args: argparse.Namespace, kernels: Sequence[str]) -> Path | None:
    if args.csv is not None or not args.o:
        return args.csv
    kernel = f"_{kernels[0]}" if len(kernels) == 1 else ""
    return Path(f"{CSV_STEM}{'_captured' if args.load_captured else ''}{kernel}.csv")


def _title(cases: Sequence[Any], device: Any) -> str:
    dtypes = dict.fromkeys(str(case.dtype).removeprefix("torch.") for case in cases)
    causal = "; causal: half of all pairs are counted" if any(c.is_causal for c in cases) else ""
    return f"{CSV_STEM}: {device}, {', '.join(dtypes)}{causal}"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; yields what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda what: progress.update(task, advance=1, description=what)


def _print_resources(rows: Sequence[Any], settings: Any) -> None:
    from ...device import device_info
    from ..bench import print_table
    from .resources import Usage, library_usage, triton_usage

    found: list[Usage] = triton_usage()
    notes = []
    for backend in dict.fromkeys(row.backend for row in rows):
        if backend in ("cuda_sage", "hopper"):
            usage = library_usage(backend, device_info(settings.device).arch)
            if isinstance(usage, str):
                notes.append(usage)
            else:
                found += usage
    if not found:
        backends = ", ".join(dict.fromkeys(row.backend for row in rows if row.backend))
        notes.append(f"no GPU kernel of ours ran; backends: {backends or 'none'}")
    else:
        cells = [[x.kernel, x.variant, str(x.registers), x.spills, str(x.shared)] for x in found]
        columns = ("kernel", "variant", "registers", "spills", "shared bytes")
        width = os.get_terminal_size().columns if os.isatty(1) else 160
        cells = [[name, variant[: width // 2], *rest] for name, variant, *rest in cells]
        print_table("registers of the compiled kernels", columns, cells)
    for note in notes:
        print(note)
