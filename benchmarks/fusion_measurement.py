"""Measure one case of the fusion on a GPU: ours beside the stage-wise form and torch.compile of it, in one run."""

from functools import partial

import torch
from fusion_cases import FORMS, Case, eager, make_inputs, make_upstream
from fusion_errors import assert_no_worse_than_eager, at_checked_images, errors_against, in_parts
from gpu_timing import MIB, cache_bytes, copies_beyond_cache, is_launch_bound
from measurement import (
    Compute,
    Row,
    add_ratios,
    attempt,
    bandwidth,
    forward_and_gradients,
    leaves,
    measure_variant,
    percent_of_floor,
    settle,
)
from roofs import Roofs, measure_roofs
from speed_targets import judge_all
from torch import Tensor

OURS = ("ours",)


def variants(case: Case) -> dict[str, Compute]:
    """Return what there is to measure, ours first."""
    form = FORMS[case.form]
    compiled = torch.compile(eager(case), dynamic=False)
    return {"ours": form.ours, "eager": eager(case), "compile": compiled, **form.peers}


def measure(case: Case, *, device: str = "cuda") -> tuple[list[Row], Roofs]:
    """Return a row for ours and for each peer, after ours was found right; the targets are judged, not enforced.

    Raises:
        AssertionError: our result is further from float64 than that of the stage-wise form in the case's dtype.
    """
    settle()
    with torch.set_grad_enabled(case.backward):
        copies = copies_beyond_cache(case.feature_bytes, cache_bytes())
        inputs = [make_inputs(case, device=device, seed=seed) for seed in range(copies)]
        upstream = make_upstream(case, device=device)
        found, missing = variants(case), dict[str, str]()
        errors = _errors(case, found, inputs[0], upstream, missing)
        roofs = measure_roofs(case.batch, case.pyramid.values_per_image, case.dtype)
        rows = []
        for name in errors:
            run = partial(_measure_variant, case, found[name], inputs, upstream, roofs)
            row = attempt(run, name, missing, needed=OURS)
            if row is not None:
                rows.append(_labels(case, name) | row | errors[name])
    rows += [_labels(case, name) | {"missing": reason} for name, reason in missing.items()]
    add_ratios(rows)
    rows[0]["targets"] = judge_all(case.targets, rows[0])
    return rows, roofs


def _errors(
    case: Case, found: dict[str, Compute], inputs: list[Tensor], upstream: Tensor, missing: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Return the errors of each form that runs; assert that ours are no larger than those of eager."""
    truth = in_parts(case, FORMS[case.form].plain, inputs, upstream, torch.float64)
    errors: dict[str, dict[str, float]] = {}
    for name, compute in found.items():
        result = attempt(partial(forward_and_gradients, compute, inputs, upstream), name, missing, needed=OURS)
        if result is not None:
            errors[name] = errors_against(case, inputs, at_checked_images(case, result), truth)
        del result  # before the next one
    if "eager" in errors:
        yardstick = errors["eager"]
    else:  # the whole batch does not fit
        yardstick = errors_against(case, inputs, in_parts(case, eager(case), inputs, upstream), truth)
    assert_no_worse_than_eager(case, errors["ours"], yardstick)
    return errors


def _labels(case: Case, variant: str) -> Row:
    return {
        "case": str(case),
        "fusion": case.form,
        "variant": variant,
        "features": case.pyramid.name,
        "width": case.width,
        "batch": case.batch,
        "passes": "forward and gradients" if case.backward else "forward",
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def _measure_variant(case: Case, compute: Compute, inputs: list[list[Tensor]], upstream: Tensor, roofs: Roofs) -> Row:
    launch_bound = is_launch_bound(case.least_bytes, roofs.copy_gb_s)
    row = measure_variant(compute, inputs, upstream, launch_bound=launch_bound)
    form = FORMS[case.form]
    kept = case.result_bytes + sum(x.numel() * x.element_size() for x in leaves(inputs[0]))
    row["peak_percent_of_features"] = round(100 * (row["peak_mib"] * MIB - kept) / case.feature_bytes, 2)
    row |= bandwidth(case.least_bytes, row["median_ms"], roofs, launch_bound=launch_bound)
    for name, moved, roof in (
        ("forward", case.forward_bytes, form.forward_roof),
        ("backward", case.backward_bytes, form.backward_roof),
    ):
        row[f"{name}_percent_of_floor"] = percent_of_floor(moved, row[f"{name}_ms"], roofs.gb_s(roof))
    return row
