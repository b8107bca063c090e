"""When workflows arrive: Poisson, bursty, or as recorded, each at the rate that is asked for.

Knows no tasks. All of it follows from its seeds.
"""

import math
from itertools import accumulate
from math import inf, isfinite
from pathlib import Path
from random import Random

import numpy as np

from chimera_predictors.traces import TracesError


def arrivals(
    name: str, rate_per_s: float, number: int, seed: int, folder: Path | None = None
) -> list[float]:
    """Times of so many arrivals: "poisson", "bursty", or a trace's name in the folder.

    All have the asked rate in the mean. Raises `ValueError` for a rate that is none and a name
    that there is not.
    """
    if name == "poisson":
        return poisson_arrivals(rate_per_s, number, seed)
    if name == "bursty":
        return bursty_arrivals(rate_per_s, number, seed)
    if folder is None:
        raise ValueError(
            f"arrivals {name!r}: neither poisson nor bursty; a trace's name needs its folder"
        )
    return replayed_arrivals(folder, name, rate_per_s, number, seed)


def replayed_arrivals(
    folder: Path, trace: str, rate_per_s: float, number: int, seed: int
) -> list[float]:
    """A stretch of a recorded trace (`arrivals.parquet`), in which time is scaled to the rate.

    The seed says where it begins; after its end a trace begins anew. The stretch itself has the
    rate, however busy a time it is from, so that all seeds have one load. Raises `ValueError`.
    """
    _check_rate(rate_per_s)
    times = _recorded_times(folder, trace)
    gaps = np.diff(times)
    start = Random(f"arrivals {seed}").randrange(len(gaps))
    chosen = np.take(gaps, range(start, start + number), mode="wrap")
    total = float(chosen.sum())
    if number and total <= 0.0:
        raise ValueError(f"{folder}: {number} arrivals of {trace!r} come at one instant")
    scale = number / rate_per_s / total if number else 0.0
    return [float(at) for at in np.cumsum(chosen) * scale]


def _recorded_times(folder: Path, trace: str) -> np.ndarray:
    path = folder / "arrivals.parquet"
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise TracesError(
            f"{error}; arrival traces need: pip install 'chimera-daemon[train]'"
        ) from error
    try:
        table = ParquetFile(path).read()
        names = table["trace"].to_pylist()
        times = np.asarray(table["t_s"].to_numpy(), dtype=np.float64)
    except (OSError, KeyError, ValueError, ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as arrivals (trace, t_s): {error}") from error
    if trace not in names:
        there = ", ".join(sorted({str(name) for name in names}))
        raise ValueError(f"{path}: no trace {trace!r}; there are: {there}")
    times = np.sort(times[np.array([name == trace for name in names])])
    if len(times) < 2 or not np.isfinite(times).all():
        raise ValueError(f"{path}: trace {trace!r} needs two arrivals or more, all at known times")
    return times


def bursty_arrivals(
    rate_per_s: float,
    number: int,
    seed: int,
    *,
    variation: float = 2.0,
    swing: float = 0.5,
    days: float = 2.0,
) -> list[float]:
    """Bursts on a day's ebb and flow, as traces of chat services show (Mooncake, arXiv 2407.00079).

    No recorded trace: gamma distributed gaps g with mean 1 and coefficient of variation
    ``variation`` (shape 1/variation²), under a rate that goes up and down,
    ``rate(t) = rate_per_s · (1 + swing · sin(2π t / period))``: the n-th arrival is where the
    integral of rate(t) reaches g_1 + … + g_n. ``days`` periods fit into the expected length of
    the run. Raises `ValueError` for values that make no sense.
    """
    _check_rate(rate_per_s)
    if not (isfinite(variation) and variation > 0.0 and 0.0 <= swing < 1.0 and 0.0 < days < inf):
        raise ValueError(
            f"bursty arrivals: variation {variation} and days {days} must be more than 0, "
            f"swing {swing} from 0 to below 1"
        )
    draw, shape = Random(f"bursts {seed}"), variation**-2.0
    period_s = number / rate_per_s / days
    draws = (draw.gammavariate(shape, 1.0 / shape) for _ in range(number))
    return [_when(total / rate_per_s, swing, period_s) for total in accumulate(draws)]


def _when(even_s: float, swing: float, period_s: float) -> float:
    """The time by which a swinging rate has brought as many as an even one by ``even_s``.

    That is t + swing · period/2π · (1 − cos(2π t/period)) = even_s, increasing in t: bisection.
    """
    reach = swing * period_s / (2.0 * math.pi)
    low, high = max(0.0, even_s - 2.0 * reach), even_s
    for _ in range(60):
        middle = 0.5 * (low + high)
        if middle + reach * (1.0 - math.cos(2.0 * math.pi * middle / period_s)) < even_s:
            low = middle
        else:
            high = middle
    return high


def poisson_arrivals(rate_per_s: float, number: int, seed: int) -> list[float]:
    """Arrival times of a Poisson process from 0 on; equal seeds give equal times."""
    _check_rate(rate_per_s)
    draw = Random(seed)
    return list(accumulate(draw.expovariate(rate_per_s) for _ in range(number)))


def _check_rate(rate_per_s: float) -> None:
    if not (isfinite(rate_per_s) and rate_per_s > 0.0):
        raise ValueError(f"the arrival rate must be more than 0 per second, not {rate_per_s}")
