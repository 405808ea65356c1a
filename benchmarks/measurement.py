"""Measure computations on a GPU beside each other: what the benchmarks of the losses and of the fusion share.

A computation maps a list of tensors to one tensor; those that require a gradient are its leaves. Ours and its peers run
in one process on the same tensors. A peer that does not run is no reason to lose our figures: its row says why.
"""

import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from gpu_timing import (
    Call,
    call_us,
    device_times,
    extra_mib,
    gigabytes_per_second,
    host_us,
    is_launch_bound,
    launched,
    queued_calls,
    staged_times,
    waits_for_the_gpu,
)
from roofs import Roofs
from torch import Tensor

Row = dict[str, Any]
Compute = Callable[..., Tensor]
Result = TypeVar("Result")

# Of one measurement: as many samples as fit into the time, between these bounds.
SAMPLED_SECONDS = 0.5
LEAST_SAMPLES, MOST_SAMPLES = 8, 40


def settle() -> None:
    """Forget the graphs and free the memory of what was measured before."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


def forward_and_gradients(compute: Compute, inputs: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, ...]:
    """Return the value and the gradients of the leaves. The upstream gradient is passed: making a 1 is no work of ours.

    Args:
        compute: the computation.
        inputs: its arguments.
        upstream: gradient of the value, None for 1.
    """
    value = compute(*inputs)
    wanted = leaves(inputs)
    return (value.detach(), *(torch.autograd.grad(value, wanted, upstream) if wanted else ()))


def attempt(run: Callable[[], Result], name: str, missing: dict[str, str], *, needed: Collection[str]) -> Result | None:
    """Return what `run` gives. Where a peer fails, out of memory or otherwise, give None and note the reason."""
    try:
        return run()
    except Exception as error:
        if name in needed:
            raise
        missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    # Here the traceback, and with it what the peer had allocated, is gone.
    gc.collect()
    torch.cuda.empty_cache()
    return None


def samples_for(microseconds: float) -> int:
    """Return how many calls of this length to time."""
    return min(max(int(1e6 * SAMPLED_SECONDS / microseconds), LEAST_SAMPLES), MOST_SAMPLES)


def measure_variant(compute: Compute, inputs: Sequence[list[Tensor]], upstream: Tensor, *, launch_bound: bool) -> Row:
    """Return times, launches and memory of the value and, where there are leaves, of their gradients.

    Args:
        compute: the computation.
        inputs: its arguments in copies to take turns over, see `copies_beyond_cache`.
        upstream: gradient of the value.
        launch_bound: whether launching is what costs; else few calls say as much as many.
    """
    backward = bool(leaves(inputs[0]))
    whole: list[Call] = [partial(forward_and_gradients, compute, one, upstream) for one in inputs]
    forward: list[Call] = [partial(compute, *one) for one in inputs]
    kernels = launched(whole[0])
    queued = queued_calls(len(kernels))
    rounds, length = (9, 64) if launch_bound else (3, 8)
    options = {
        "samples": samples_for(call_us(whole, rounds=1, length=2)),
        "calls_per_sample": queued if launch_bound else 1,
        "queued": queued,
    }
    times = device_times(whole, **options)
    forward_ms, backward_ms = times.median_ms, None
    if backward:
        forward_ms = device_times(forward, **options).median_ms
        # By itself, the first through its graph, right after forward as in training.
        stages = [partial(_backward_after_forward, compute, one, upstream) for one in inputs]
        backward_ms = round(staged_times(stages, **options).median_ms, 5)
    peak_mib, _ = extra_mib(whole[0])
    _, retained_mib = extra_mib(forward[0])
    return {
        "median_ms": round(times.median_ms, 5),
        "p20_ms": round(times.p20_ms, 5),
        "p80_ms": round(times.p80_ms, 5),
        "forward_ms": round(forward_ms, 5),
        "backward_ms": backward_ms,
        "launches": len(kernels),
        "kernels": [kernel[:60] for kernel in kernels],
        "cpu_us": round(host_us(whole, rounds=rounds, queued=queued), 2),
        "call_us": round(call_us(whole, rounds=rounds, length=length), 2),
        "waits_for_the_gpu": waits_for_the_gpu(whole[0]),
        "peak_mib": round(peak_mib, 3),
        "retained_mib": round(retained_mib, 3),
    }


def _backward_after_forward(compute: Compute, inputs: list[Tensor], upstream: Tensor) -> Call:
    return partial(torch.autograd.grad, compute(*inputs), leaves(inputs), upstream)


def bandwidth(least_bytes: int, median_ms: float, roofs: Roofs, *, launch_bound: bool) -> Row:
    """Return GB/s of the least bytes and its percentage of each roof; None where launch time dominates."""
    gb_s = None if launch_bound else gigabytes_per_second(least_bytes, median_ms)
    shares = {
        f"percent_of_{name}_roof": None if gb_s is None else round(100 * gb_s / roofs.gb_s(name), 1)
        for name in ("copy", "read", "two_reads_one_write")
    }
    return {"gb_s": None if gb_s is None else round(gb_s, 1), **shares}


def percent_of_floor(least_bytes: int, milliseconds: float | None, roof_gb_s: float) -> float | None:
    """Return the time at the roof in percent of the measured time; None where launch time dominates."""
    if milliseconds is None or is_launch_bound(least_bytes, roof_gb_s):
        return None
    return round(100 * gigabytes_per_second(least_bytes, milliseconds) / roof_gb_s, 1)


def add_ratios(rows: list[Row]) -> None:
    """Write into the first row how many times as long each other one takes, on the GPU alone and as a loop of calls."""
    ours = rows[0]
    for row in rows[1:]:
        if "missing" not in row:
            ours[f"ratio_{row['variant']}"] = round(row["median_ms"] / ours["median_ms"], 3)
            ours[f"call_ratio_{row['variant']}"] = round(row["call_us"] / ours["call_us"], 3)


def as_line(row: Mapping[str, Any], *errors: str) -> str:
    """Return a row as one line for the terminal, with these of its columns at the end."""
    if "missing" in row:
        return f"{row['case']:46} {row['variant']:9} {row['missing']}"
    gb_s = "     launches" if row["gb_s"] is None else f"{row['gb_s']:7.0f} GB/s {row['percent_of_copy_roof']:5.1f} %"
    return (
        f"{row['case']:46} {row['variant']:9} {row['median_ms']:9.4f} ms [{row['p20_ms']:.4f}, {row['p80_ms']:.4f}] "
        f"{gb_s:>20} {row['launches']:3} launches {row['cpu_us']:7.1f} CPU us {row['call_us']:8.1f} us/call "
        f"peak {row['peak_mib']:9.2f} MiB  " + "  ".join(f"{e.replace('_', ' ')} {row[e]:.1e}" for e in errors)
    )
