"""Times, launches and memory of calls on a GPU.

A short loop over the same tensors would measure the cache, and events around a call that the processor issues too late
would measure the processor. So the calls take turns over more data than three times the L2 holds, and a batch of them
is queued behind a sleeping kernel: by the time the GPU gets to the first, the last has been issued.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Call = Callable[[], Any]

MIB = 2**20
CACHE_MULTIPLE = 3  # times the L2
# The driver takes about a thousand launches before it makes the caller wait; see `queued_calls`.
QUEUED_LAUNCHES = 800
QUEUED_CALLS = 16  # at most
# Below this time for the bytes alone, launching is what costs: no GB/s is given.
LEAST_TRAFFIC_US = 10.0
_CYCLES_PER_SECOND = 2e9  # at most, of the GPU; a lower clock sleeps longer


@dataclass(frozen=True)
class Times:
    """The spread of one measurement."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of the values lie, linear between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(milliseconds: Sequence[float]) -> Times:
    return Times(statistics.median(milliseconds), percentile(milliseconds, 20), percentile(milliseconds, 80))


def copies_beyond_cache(bytes_per_copy: int, cache_bytes: int, *, at_most: int = 64) -> int:
    """Return how many copies of the inputs to cycle through: at least two, so that no call finds its data cached."""
    return min(max(math.ceil(CACHE_MULTIPLE * cache_bytes / bytes_per_copy), 2), at_most)


def gigabytes_per_second(moved_bytes: int, milliseconds: float) -> float:
    return moved_bytes / milliseconds / 1e6


def is_launch_bound(moved_bytes: int, roof_gb_s: float) -> bool:
    return moved_bytes / roof_gb_s / 1e3 < LEAST_TRAFFIC_US


def queued_calls(launches: int) -> int:
    """Return how many calls of so many launches each the driver takes at once."""
    return max(min(QUEUED_CALLS, QUEUED_LAUNCHES // max(launches, 1)), 1)


def cache_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def host_us(calls: Sequence[Call], *, rounds: int, queued: int = QUEUED_CALLS) -> float:
    """Return the time the processor needs to issue one call of `queued`, in microseconds, nothing waited for."""
    turns = itertools.cycle(calls)
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(queued):
            next(turns)()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times) / queued


def call_us(calls: Sequence[Call], *, rounds: int, length: int) -> float:
    """Return the time of one call of a back-to-back loop, in microseconds: the slower of processor and GPU."""
    turns = itertools.cycle(calls)
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(length):
            next(turns)()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / length


def device_times(
    calls: Sequence[Call], *, samples: int = 40, calls_per_sample: int = 1, queued: int = QUEUED_CALLS
) -> Times:
    """Time calls on the GPU alone, in milliseconds per call.

    Args:
        calls: the same computation on different tensors, taken in turn.
        samples: number of measurements.
        calls_per_sample: calls between two events; more than one for those no longer than the events' resolution.
        queued: calls issued before the first one runs.
    """
    stages = [partial(_itself, call) for call in calls]
    return staged_times(stages, samples=samples, calls_per_sample=calls_per_sample, queued=queued)


def staged_times(
    stages: Sequence[Callable[[], Call]], *, samples: int = 40, calls_per_sample: int = 1, queued: int = QUEUED_CALLS
) -> Times:
    """As `device_times`, for calls that need something done before: a stage does that, untimed, and gives the call."""
    assert calls_per_sample <= queued
    whole: list[Call] = [partial(_run, stage) for stage in stages]
    for call in whole[:2]:
        call()
    issue_seconds = host_us(whole, rounds=3, queued=queued) / 1e6
    turns = itertools.cycle(stages)
    batch = queued // calls_per_sample
    milliseconds: list[float] = []
    while len(milliseconds) < samples:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(batch)]
        torch.cuda.synchronize()
        asleep = 2 * issue_seconds * batch * calls_per_sample + 1e-3
        torch.cuda._sleep(int(asleep * _CYCLES_PER_SECOND))
        for start, end in events:
            calls = [next(turns)() for _ in range(calls_per_sample)]
            start.record()
            for call in calls:
                call()
            end.record()
        torch.cuda.synchronize()
        milliseconds += [start.elapsed_time(end) / calls_per_sample for start, end in events]
    return spread(milliseconds[:samples])


def _itself(call: Call) -> Call:
    return call


def _run(stage: Callable[[], Call]) -> None:
    stage()()


def launched(call: Call) -> list[str]:
    """Return the names of what one call starts on the GPU: kernels, copies and fills."""
    call()
    torch.cuda.synchronize()
    names: list[str] = []
    for _ in range(2):  # the first profile of a process may miss kernels while the profiler starts
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        # Named ranges, as compiled graphs open them, are listed among what runs on the GPU.
        names = [
            event.name
            for event in profile.events() or []
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
    return names


def waits_for_the_gpu(call: Call) -> bool:
    """Tell whether the call makes the processor wait, as reading a value of a GPU tensor does."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def extra_mib(call: Call) -> tuple[float, float]:
    """Return the most memory during the call and what its result holds, in MiB above what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del result
    return peak / MIB, held / MIB
