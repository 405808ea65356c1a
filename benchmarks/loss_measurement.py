"""Measure one case of the losses on a GPU: ours beside plain PyTorch, torch.compile and Liger-Kernel, in one run."""

import importlib.util
from functools import partial

import torch
from gpu_timing import MIB, cache_bytes, copies_beyond_cache, is_launch_bound
from loss_cases import LOSSES, Case, assert_no_worse_than_eager, errors_against_float64, make_inputs
from measurement import (
    Compute,
    Row,
    add_ratios,
    attempt,
    bandwidth,
    forward_and_gradients,
    measure_variant,
    settle,
)
from roofs import Roofs, measure_roofs
from speed_targets import judge_all
from torch import Tensor


def variants(case: Case) -> tuple[dict[str, Compute], dict[str, str]]:
    """Return what there is to measure, and for what is missing the reason."""
    loss = LOSSES[case.loss]
    found: dict[str, Compute] = {"ours": partial(loss.ours, impl="fused"), "eager": loss.eager}
    found["compile"] = torch.compile(loss.eager, dynamic=False)
    if loss.liger is None:
        return found, {"liger": "has no such loss"}
    if importlib.util.find_spec("liger_kernel") is None:
        return found, {"liger": "liger_kernel is not installed"}
    return found | {"liger": loss.liger}, {}


def measure(case: Case) -> tuple[list[Row], Roofs]:
    """Return a row for ours and for each peer, after ours was found right; the targets are judged, not enforced.

    Raises:
        AssertionError: our result is further from float64 than that of plain PyTorch.
    """
    settle()
    copies = copies_beyond_cache(case.least_bytes - case.gradient_bytes, cache_bytes())
    inputs = [make_inputs(case, device="cuda", seed=seed) for seed in range(copies)]
    found, missing = variants(case)
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, compute in found.items():
        run = partial(forward_and_gradients, compute, inputs[0], None)
        result = attempt(run, name, missing, needed=("ours", "eager"))
        if result is not None:
            results[name] = result
    errors = errors_against_float64(case, inputs[0], results)
    assert_no_worse_than_eager(case, results["ours"], errors["ours"], errors["eager"])
    upstream = {name: torch.ones_like(result[0]) for name, result in results.items()}
    del results
    roofs = measure_roofs(case.rows, case.classes, case.dtype)
    rows = []
    for name, one in upstream.items():
        run_row = partial(_measure_variant, case, found[name], inputs, one, roofs)
        row = attempt(run_row, name, missing, needed=("ours", "eager"))
        if row is not None:
            rows.append(_labels(case, name) | row | errors[name])
    rows += [_labels(case, name) | {"missing": reason} for name, reason in missing.items()]
    add_ratios(rows)
    rows[0]["targets"] = judge_all(case.targets, rows[0])
    return rows, roofs


def _labels(case: Case, variant: str) -> Row:
    return {
        "case": str(case),
        "loss": case.loss,
        "variant": variant,
        "rows": case.rows,
        "classes": case.classes,
        "dtype": case.dtype_name,
    }


def _measure_variant(case: Case, compute: Compute, inputs: list[list[Tensor]], upstream: Tensor, roofs: Roofs) -> Row:
    launch_bound = is_launch_bound(case.least_bytes, roofs.copy_gb_s)
    row = measure_variant(compute, inputs, upstream, launch_bound=launch_bound)
    row["peak_over_gradients"] = round(row["peak_mib"] * MIB / case.gradient_bytes, 4)
    return row | bandwidth(case.least_bytes, row["median_ms"], roofs, launch_bound=launch_bound)
