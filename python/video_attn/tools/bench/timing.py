"""Times of calls: peers in turn, one clock for each kind of device, and the GPU's clock beside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

_FLUSH_BYTES = 256 << 20  # larger than the L2 cache of any GPU served


@dataclass(frozen=True)
class Timing:
    """Seconds per call, measured one by one.

    Args:
        sm_mhz, watts: medians of the GPU's clock and power while these calls ran; None on a CPU
            and where they cannot be read.
    """

    samples: tuple[float, ...]
    sm_mhz: float | None = None
    watts: float | None = None

    def quantile(self, share: float) -> float:
        """The sample below which ``share`` of the samples lie, between neighbours interpolated."""
        ordered = sorted(self.samples)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def __str__(self) -> str:
        return (
            f"{self.median * 1e3:.2f} ms "
            f"({self.quantile(0.2) * 1e3:.2f} to {self.quantile(0.8) * 1e3:.2f})"
        )


def time_interleaved(
    providers: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    repeats: int = 10,
    warmup: int = 1,
    flush: bool = True,
    seconds: float | None = None,
) -> dict[str, Timing]:
    """Times every provider ``repeats`` times, in turn: a slow spell of the machine hits all alike.

    Every other round goes backwards, so that nobody always runs after the same neighbour. On a GPU
    the times are those between two events around each call, and ``flush`` empties the L2 cache
    before it. A provider that would need more than ``seconds`` (None: no limit) for all rounds
    takes part in fewer of them, spread evenly, but in at least three.

    Raises:
        ValueError: ``repeats`` < 1 or ``warmup`` < 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, got {repeats} and {warmup}")
    clock = _CudaClock(flush) if torch.device(device).type == "cuda" else _CpuClock()
    counts = dict.fromkeys(providers, repeats)
    for name, run in providers.items():
        once = [clock.time(run).seconds for _ in range(warmup)]
        if seconds is not None and once:
            counts[name] = min(repeats, max(3, int(seconds / max(once[-1], 1e-9))))
    samples: dict[str, list[_Sample]] = {name: [] for name in providers}
    for n in range(repeats):
        for name in list(providers) if n % 2 == 0 else reversed(list(providers)):
            if (n + 1) * counts[name] // repeats > n * counts[name] // repeats:
                samples[name].append(clock.time(providers[name]))
    return {name: _timing(taken) for name, taken in samples.items()}


class _Sample(NamedTuple):
    seconds: float
    sm_mhz: float | None = None
    watts: float | None = None


def _timing(samples: list[_Sample]) -> Timing:
    def median(values: list[float | None]) -> float | None:
        known = [x for x in values if x is not None]
        return statistics.median(known) if known else None

    return Timing(
        tuple(x.seconds for x in samples),
        median([x.sm_mhz for x in samples]),
        median([x.watts for x in samples]),
    )


class _CpuClock:
    def time(self, run: Callable[[], object]) -> _Sample:
        start = time.perf_counter()
        run()
        return _Sample(time.perf_counter() - start)


class _CudaClock:
    def __init__(self, flush: bool) -> None:
        self._scratch = torch.empty(_FLUSH_BYTES if flush else 0, dtype=torch.int8, device="cuda")

    def time(self, run: Callable[[], object]) -> _Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        start.record()
        run()
        end.record()
        state = _gpu_state()  # the call has been queued and mostly still runs
        end.synchronize()
        return _Sample(start.elapsed_time(end) / 1e3, *state)


def _gpu_state() -> tuple[float | None, float | None]:
    """(SM clock in MHz, power in watts) of the current GPU, by NVML."""
    try:
        return float(torch.cuda.clock_rate()), torch.cuda.power_draw() / 1e3
    except (ImportError, RuntimeError, AttributeError):  # no nvidia-ml-py, or not an NVIDIA GPU
        return None, None
