"""Times of calls: peers in turn, one clock for each kind of device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # larger than the L2 cache of any GPU served


@dataclass(frozen=True)
class Timing:
    """Seconds per call, measured one by one."""

    samples: tuple[float, ...]

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
) -> dict[str, Timing]:
    """Times every provider ``repeats`` times, in turn: a slow spell of the machine hits all alike.

    Every other round goes backwards, so that nobody always runs after the same neighbour. On a GPU
    the times are those between two events around each call, and ``flush`` empties the L2 cache
    before it.

    Raises:
        ValueError: ``repeats`` < 1 or ``warmup`` < 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, got {repeats} and {warmup}")
    clock = _CudaClock(flush) if torch.device(device).type == "cuda" else _CpuClock()
    for run in providers.values():
        for _ in range(warmup):
            clock.time(run)
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for n in range(repeats):
        for name in list(providers) if n % 2 == 0 else reversed(list(providers)):
            samples[name].append(clock.time(providers[name]))
    return {name: Timing(tuple(times)) for name, times in samples.items()}


class _CpuClock:
    def time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class _CudaClock:
    def __init__(self, flush: bool) -> None:
        self._scratch = torch.empty(_FLUSH_BYTES if flush else 0, dtype=torch.int8, device="cuda")

    def time(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
