"""Times of work on a CUDA device, by events and by the host's clock, and what the card can do.

Knows nothing of what is timed. Importing it needs torch, its functions need a GPU.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from chimera_bench.roofline import Ceilings

Work = Callable[[], object]

_FEWEST_RUNS, _MOST_RUNS = 20, 300
_COPIED_ELEMENTS = 1 << 29  # 2 GiB of fp32, more than any cache
_FLUSHED_BYTES = 1 << 28
_MATRIX = 8192
_CEILING_RUNS = 20
_WARM_UPS = 3
_LEAST_SLEEP_US = 30.0
_MOST_SLEEP_US = 20_000.0


class Times(NamedTuple):
    """Microseconds of the device: from the first kernel to the last one, launches hidden."""

    p20_us: float
    p50_us: float
    p80_us: float
    cold_us: float  # median with nothing of it in the cache
    wall_us: float  # median of the host's clock, from the call to the device's end
    runs: int


class Timer:
    """Times work on the current device; measures once how long the device sleeps per cycle."""

    def __init__(self, seconds: float) -> None:
        """About so many `seconds` go into each of the three measurements of `times`."""
        self._seconds = seconds
        self._cycles_per_us = 1e6 / _median_us(lambda: torch.cuda._sleep(1_000_000))
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def times(self, work: Work, load: Callable[[int], None] = lambda _: None) -> Times:
        """`load(i)` makes the inputs of run i ready before it, which is not timed.

        The device is put to sleep before each run for longer than the host needs to launch it, so
        that what is timed is the device alone, for a graph as for launches one by one.
        """
        for run in range(_WARM_UPS):
            load(run)
            work()
        guess = sorted(self._wall(work, load, run) for run in range(5))[2]
        runs = max(_FEWEST_RUNS, min(_MOST_RUNS, int(1e6 * self._seconds / (guess + 1.0))))
        wall = [self._wall(work, load, run) for run in range(runs)]
        sleep_us = min(max(1.5 * percentile(wall, 0.8), _LEAST_SLEEP_US), _MOST_SLEEP_US)
        warm = self._device(work, load, runs, sleep_us, cold=False)
        cold = self._device(work, load, runs, sleep_us, cold=True)
        p20, p50, p80 = (percentile(warm, share) for share in (0.2, 0.5, 0.8))
        return Times(p20, p50, p80, percentile(cold, 0.5), percentile(wall, 0.5), runs)

    def _wall(self, work: Work, load: Callable[[int], None], run: int) -> float:
        load(run)
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - started)

    def _device(
        self, work: Work, load: Callable[[int], None], runs: int, sleep_us: float, cold: bool
    ) -> list[float]:
        found: list[float] = []
        for run in range(runs):
            load(run)
            if cold:
                self._flushed.fill_(run % 100)
            torch.cuda._sleep(int(sleep_us * self._cycles_per_us))
            found.append(_event_us(work))
        return found


def _event_us(work: Work) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least this `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def walls_us(work: Callable[[Any], object], inputs: Sequence[Any]) -> list[float]:
    """The host's time of `work` for each of these inputs, one after the other."""
    found: list[float] = []
    for each in inputs:
        started = time.perf_counter()
        work(each)
        found.append(1e6 * (time.perf_counter() - started))
    return found


def captured(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same work as one CUDA graph; each call replays it and gives the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):  # compiling and making handles cannot be captured
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def ceilings() -> Ceilings:
    """Of this card, now: a copy of 2 GiB and a product of 8192³, both of random numbers."""
    return Ceilings(_copy_rate(), _product_rate())


def _copy_rate() -> float:
    source = torch.empty(_COPIED_ELEMENTS, device="cuda").normal_()
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return 1e6 * moved / _median_us(lambda: target.copy_(source))


def _product_rate() -> float:
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 1e6 * 2 * _MATRIX**3 / _median_us(lambda: torch.mm(a, b))


def _median_us(work: Work) -> float:
    for _ in range(_WARM_UPS):
        work()
    return percentile([_event_us(work) for _ in range(_CEILING_RUNS)], 0.5)
