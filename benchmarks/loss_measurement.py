"""Measure one case of the losses on a GPU: ours beside plain PyTorch, torch.compile and Liger-Kernel, in one run."""

import gc
import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from gpu_timing import (
    MIB,
    QUEUED_CALLS,
    Call,
    cache_bytes,
    call_us,
    copies_beyond_cache,
    device_times,
    extra_mib,
    gigabytes_per_second,
    host_us,
    is_launch_bound,
    launched,
    staged_times,
    waits_for_the_gpu,
)
from loss_cases import (
    LOSSES,
    Case,
    Compute,
    assert_no_worse_than_eager,
    errors_against_float64,
    forward_and_gradients,
    leaves,
    make_inputs,
)
from roofs import Roofs, measure_roofs
from speed_targets import judge_all
from torch import Tensor

Row = dict[str, Any]


def variants(case: Case) -> tuple[dict[str, Compute], dict[str, str]]:
    """Give what there is to measure, and for what is missing the reason."""
    loss = LOSSES[case.loss]
    found: dict[str, Compute] = {"ours": partial(loss.ours, impl="fused"), "eager": loss.eager}
    found["compile"] = torch.compile(loss.eager, dynamic=False)
    if loss.liger is None:
        return found, {"liger": "has no such loss"}
    if importlib.util.find_spec("liger_kernel") is None:
        return found, {"liger": "liger_kernel is not installed"}
    return found | {"liger": loss.liger}, {}


def measure(case: Case) -> tuple[list[Row], Roofs]:
    """Give a row for ours and for each peer, after ours was found right; the targets are judged, not enforced.

    Raises:
        AssertionError: our result is further from float64 than that of plain PyTorch.
    """
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    copies = copies_beyond_cache(case.least_bytes - case.gradient_bytes, cache_bytes())
    inputs = [make_inputs(case, device="cuda", seed=seed) for seed in range(copies)]
    found, missing = variants(case)
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, compute in found.items():
        try:
            value = compute(*inputs[0])
            results[name] = (value.detach(), *torch.autograd.grad(value, leaves(inputs[0])))
        except Exception as error:
            if name in ("ours", "eager"):
                raise
            # A peer that does not run with these versions is no reason to lose our own figures; the row says why.
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    errors = errors_against_float64(case, inputs[0], results)
    assert_no_worse_than_eager(case, results["ours"], errors["ours"], errors["eager"])
    upstream = {name: torch.ones_like(result[0]) for name, result in results.items()}
    del results
    roofs = measure_roofs(case.rows, case.classes, case.dtype)
    rows = [
        _measure_variant(case, name, found[name], inputs, upstream[name], roofs) | errors[name] for name in upstream
    ]
    rows += [_labels(case, name) | {"missing": reason} for name, reason in missing.items()]
    add_ratios(rows)
    rows[0]["targets"] = judge_all(case.targets, rows[0])
    return rows, roofs


def add_ratios(rows: list[Row]) -> None:
    """Write into the first row how many times as long each other one takes, on the GPU alone and as a loop of calls."""
    ours = rows[0]
    for row in rows[1:]:
        if "missing" not in row:
            ours[f"ratio_{row['variant']}"] = round(row["median_ms"] / ours["median_ms"], 3)
            ours[f"call_ratio_{row['variant']}"] = round(row["call_us"] / ours["call_us"], 3)


def _labels(case: Case, variant: str) -> Row:
    return {
        "case": str(case),
        "loss": case.loss,
        "variant": variant,
        "rows": case.rows,
        "classes": case.classes,
        "dtype": case.dtype_name,
    }


def _measure_variant(
    case: Case, name: str, compute: Compute, inputs: list[list[Tensor]], upstream: Tensor, roofs: Roofs
) -> Row:
    whole = [partial(forward_and_gradients, compute, one, upstream) for one in inputs]
    forward = [partial(compute, *one) for one in inputs]
    launch_bound = is_launch_bound(case.least_bytes, roofs.copy_gb_s)
    per_sample = QUEUED_CALLS if launch_bound else 1
    # Where the GPU is what takes the time, few calls say as much as many.
    rounds, length = (9, 64) if launch_bound else (3, 8)
    times = device_times(whole, calls_per_sample=per_sample)
    forward_times = device_times(forward, calls_per_sample=per_sample)
    peak_mib, _ = extra_mib(whole[0])
    _, retained_mib = extra_mib(forward[0])
    kernels = launched(whole[0])
    row = _labels(case, name) | {
        "median_ms": round(times.median_ms, 5),
        "p20_ms": round(times.p20_ms, 5),
        "p80_ms": round(times.p80_ms, 5),
        "forward_ms": round(forward_times.median_ms, 5),
        "backward_ms": round(_backward_ms(compute, inputs, upstream, per_sample), 5),
        "launches": len(kernels),
        "kernels": [kernel[:60] for kernel in kernels],
        "cpu_us": round(host_us(whole, rounds=rounds), 2),
        "call_us": round(call_us(whole, rounds=rounds, length=length), 2),
        "waits_for_the_gpu": waits_for_the_gpu(whole[0]),
        "peak_mib": round(peak_mib, 3),
        "retained_mib": round(retained_mib, 3),
        "peak_over_gradients": round(peak_mib * MIB / case.gradient_bytes, 4),
    }
    return row | bandwidth(case.least_bytes, times.median_ms, roofs, launch_bound=launch_bound)


def bandwidth(least_bytes: int, median_ms: float, roofs: Roofs, *, launch_bound: bool) -> Row:
    """Give GB/s of the least bytes and its share of the roofs in percent; None where launches are what is measured."""
    if launch_bound:
        return {"gb_s": None, "percent_of_copy_roof": None, "percent_of_two_reads_one_write_roof": None}
    gb_s = gigabytes_per_second(least_bytes, median_ms)
    return {
        "gb_s": round(gb_s, 1),
        "percent_of_copy_roof": round(100 * gb_s / roofs.copy_gb_s, 1),
        "percent_of_two_reads_one_write_roof": round(100 * gb_s / roofs.two_reads_one_write_gb_s, 1),
    }


def _backward_ms(compute: Compute, inputs: list[list[Tensor]], upstream: Tensor, per_sample: int) -> float:
    """Time the backward pass by itself, the first through its graph, right after forward as in training."""

    def after_forward(one: list[Tensor]) -> Call:
        return partial(torch.autograd.grad, compute(*one), leaves(one), upstream)

    return staged_times([partial(after_forward, one) for one in inputs], calls_per_sample=per_sample).median_ms


def as_line(row: Mapping[str, Any]) -> str:
    """Give a row as one line for the terminal."""
    if "missing" in row:
        return f"{row['case']:38} {row['variant']:8} {row['missing']}"
    gb_s = "     launches" if row["gb_s"] is None else f"{row['gb_s']:7.0f} GB/s {row['percent_of_copy_roof']:5.1f} %"
    return (
        f"{row['case']:38} {row['variant']:8} {row['median_ms']:9.4f} ms [{row['p20_ms']:.4f}, {row['p80_ms']:.4f}] "
        f"{gb_s:>20} {row['launches']:3} launches {row['cpu_us']:7.1f} CPU us {row['call_us']:8.1f} us/call "
        f"peak {row['peak_mib']:9.2f} MiB  error {row['gradient_error']:.1e}"
    )
