"""Timing of several computations against each other."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved_medians(
    computations: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median time of each computation, in seconds, all measured in one run.

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
    return {name: statistics.median(times) for name, times in seconds.items()}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
