"""Timing of several computations against each other."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Quartiles(NamedTuple):
    """The quartiles of a figure that was measured several times."""

    low: float
    median: float
    high: float

    def rounded(self, digits: int) -> list[float]:
        return [round(value, digits) for value in self]


def interleaved_medians(
    computations: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median time of each computation, in seconds, see `interleaved_times`."""
    times = interleaved_times(computations, rounds=rounds, warmup=warmup, clock=clock)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def interleaved_times(
    computations: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the times of each computation, in seconds, round by round, all measured in one run.

    One call of each per round, in turn: what changes slowly, the clock of the processor or another process, falls on
    all of them alike, and a median drops what comes in bursts. On a GPU each call ends with a synchronisation.

    Args:
        computations: name -> what to call.
        rounds: how many calls of each are timed.
        warmup: how many before that are not.
        clock: `time.process_time` where other processes take turns on the cores; it counts the work of all threads.
    """
    seconds: dict[str, list[float]] = {name: [] for name in computations}
    for done in range(-warmup, rounds):
        for name, compute in computations.items():
            _synchronise()
            start = clock()
            compute()
            _synchronise()
            if done >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio_quartiles(times: Sequence[float], others: Sequence[float]) -> Quartiles:
    """Return the quartiles of the ratios of two computations' times, of each round.

    Example:
        >>> ratio_quartiles([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
        Quartiles(low=1.5, median=2.0, high=2.5)
    """
    ratios = [one / other for one, other in zip(times, others, strict=True)]
    return Quartiles(*statistics.quantiles(ratios, n=4, method="inclusive"))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
