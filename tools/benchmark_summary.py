"""What the README shows of the GPU's records: one picture and one small table.

    python tools/benchmark_summary.py        # draws docs/images/gpu.png from benchmarks/results

The figures are those of the records and of nothing else, of the card that was measured last; the
picture keeps a fingerprint of the bars it shows, by which a test sees that it is old.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "gpu.png"
OURS = ("video_attn",)


@dataclass(frozen=True)
class Bar:
    """One provider of a panel; TFLOPS count attended pairs only."""

    name: str
    tflops: float
    milliseconds: float
    sm_mhz: float | None

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


@dataclass(frozen=True)
class Panel:
    """One problem, with everybody who ran it in the same run, the fastest first."""

    title: str
    bars: tuple[Bar, ...]

    @property
    def best(self) -> Bar:
        return next(bar for bar in self.bars if bar.ours)

    @property
    def best_peer(self) -> Bar | None:
        return next((bar for bar in self.bars if not bar.ours), None)


# Title, record, what its rows must have, names that are left out.
PANELS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("dense, 32,768 tokens, forward", "dense", {"tokens": 32768, "pass": "forward"}),
    ("dense, 32,768 tokens, backward", "dense", {"tokens": 32768, "pass": "backward"}),
    ("STA 30×48×80, window 3×3×3, forward", "sta", {"window": "3x3x3", "pass": "forward"}),
    ("STA 30×48×80, window 3×3×3, backward", "sta", {"window": "3x3x3", "pass": "backward"}),
    ("VSA, 76 of 768 blocks of 64, forward", "vsa",
     {"blocks": "neighbouring", "kept_blocks": 76, "pass": "forward"}),
    ("VSA, 76 of 768 blocks of 64, backward", "vsa",
     {"blocks": "neighbouring", "kept_blocks": 76, "pass": "backward"}),
    ("INT8 and FP8, dense, 32,768 tokens", "quantized",
     {"tokens": 32768, "pass": "forward", "window": None}),
    ("INT8 and FP8, STA 30×48×80", "quantized",
     {"window": "3x3x3", "pass": "forward", "order": None}),
)  # fmt: skip


def shown_records() -> dict[str, dict[str, Any]]:
    """The records of the panels that are there, all of the card that was measured last."""
    names = dict.fromkeys(name for _, name, _ in PANELS)
    found = [(path.stem.rpartition("_")[0], path) for path in sorted(RESULTS.glob("*.json"))]
    records = [(n, json.loads(path.read_text(encoding="utf-8"))) for n, path in found if n in names]
    on_gpus = [(name, record) for name, record in records if record["machine"].get("gpu")]
    if not on_gpus:
        return {}
    newest = max((record for _, record in on_gpus), key=lambda record: record["date"])
    card = newest["machine"]["gpu"]
    return {name: record for name, record in on_gpus if record["machine"]["gpu"] == card}


def panels() -> list[Panel]:
    """Those panels whose record is there."""
    found, records = [], shown_records()
    for title, name, wanted in PANELS:
        if record := records.get(name):
            bars = sorted(_bars(record, wanted), key=lambda bar: bar.milliseconds)
            if any(bar.ours for bar in bars):
                found.append(Panel(title, tuple(bars)))
    return found


def _bars(record: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Bar]:
    """The timed rows of a problem; codes that exist already are no whole call."""
    for row in record["results"]:
        fits = all(row["problem"].get(key) == value for key, value in wanted.items())
        if fits and "tflops" in row["metrics"] and "codes given" not in row["provider"]:
            tflops = row["metrics"]["tflops"]
            yield Bar(_name(row), tflops, row["median_ms"], row.get("sm_mhz"))


def _name(row: dict[str, Any]) -> str:
    sparse = {"window", "blocks"} & set(row["problem"])
    name = str(row["provider"]).removeprefix("torch SDPA ").removesuffix(", same mask")
    return name if sparse else name.removesuffix(", dense")


def card() -> str:
    """The card, the days and the commits of the records that are shown."""
    return circumstances(list(shown_records().values()))


def circumstances(records: list[dict[str, Any]]) -> str:
    """Cards, versions of torch, days and commits of some records, each once."""
    if not records:
        return ""
    cards = _each_once(record["machine"]["gpu"] for record in records)
    versions = _each_once(record["versions"]["torch"] for record in records)
    days = _each_once(record["date"][:10] for record in records)
    commits = _each_once(record["commit"][:7] for record in records)
    return f"{cards}, torch {versions}, {days}, commit {commits}"


def _each_once(words: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(words))


def summary_rows() -> list[list[str]]:
    """The README's table: ours and the fastest peer of the same run, with the clocks they had."""
    rows = []
    for panel in panels():
        best, peer = panel.best, panel.best_peer
        ours = f"{best.name}: {_figures(best)}"
        if peer is None:
            rows.append([panel.title, ours, "", ""])
            continue
        times = f"{peer.milliseconds / best.milliseconds:.2f}"
        rows.append([panel.title, ours, f"{peer.name}: {_figures(peer)}", times])
    return rows


def _figures(bar: Bar) -> str:
    clock = "" if bar.sm_mhz is None else f" at {bar.sm_mhz / 1e3:.2f} GHz"
    return f"{bar.milliseconds:.2f} ms, {bar.tflops:.0f} TFLOPS{clock}"


def fingerprint() -> str:
    """What the picture shows, as one word."""
    shown = [(p.title, [(b.name, f"{b.milliseconds:.4g}") for b in p.bars]) for p in panels()]
    return hashlib.sha256(json.dumps([card(), shown]).encode()).hexdigest()[:16]


def draw(path: Path = PICTURE) -> None:
    """Bars of every panel, ours in colour."""
    from PIL.Image import fromarray
    from PIL.PngImagePlugin import PngInfo

    from video_attn.tools.plot import style

    shown = panels()
    columns, rows = 2, -(-len(shown) // 2)
    deepest = [max(len(p.bars) for p in shown[2 * r : 2 * r + 2]) for r in range(rows)]
    height = 1.1 + sum(0.28 * n + 0.55 for n in deepest) + 0.3
    figure = style.new_figure(12.5, height)
    model = next(iter(shown_records().values()))["machine"]["gpu"]
    title = f"Attention on one {model}: milliseconds, less is better"
    style.headline(figure, title, f"{card()}; everybody in one run, checked before it is timed")
    grid = figure.add_gridspec(
        rows, columns, height_ratios=deepest, left=0.16, right=0.96, top=1 - 1.15 / height,
        bottom=0.3 / height, hspace=0.6, wspace=0.5,
    )  # fmt: skip
    for number, panel in enumerate(shown):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        names = [bar.name.removeprefix("video_attn ") for bar in panel.bars]
        colors = [style.SEEN if bar.ours else style.SEEN_BEFORE for bar in panel.bars]
        axes.barh(names, [bar.milliseconds for bar in panel.bars], color=colors, height=0.72)
        axes.invert_yaxis()
        for place, bar in enumerate(panel.bars):
            large = bar.milliseconds >= 100
            text = f" {bar.milliseconds:,.0f}" if large else f" {bar.milliseconds:.3g}"
            axes.text(bar.milliseconds, place, text, va="center", size=9, color=style.INK)
        style.bare(axes, panel.title, weight="bold")
        axes.set_yticks(range(len(names)), names, size=9, color=style.INK)
        axes.tick_params(length=0)
        axes.set_xlim(0, 1.12 * max(bar.milliseconds for bar in panel.bars))
    info = PngInfo()
    info.add_text("records", fingerprint())
    path.parent.mkdir(parents=True, exist_ok=True)
    fromarray(style.pixels(figure)).quantize(64).save(path, optimize=True, pnginfo=info)


def main() -> int:
    if not panels():
        print(f"no records of a GPU in {RESULTS}: run the benchmarks on one")
        return 1
    draw()
    print(f"drawn: {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
