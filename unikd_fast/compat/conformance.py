"""Writes docs/conformance.md: how closely each drop-in agrees with its original, and which version that was.

    python -m unikd_fast.compat.conformance docs/conformance.md

It needs the packages of the extra `compat-test`, and says which one is missing: the table never silently loses a row.
"""

import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from unikd_fast.compat import _published
from unikd_fast.compat._difference import Difference, difference, largest, measure
from unikd_fast.compat.patching import installed_version
from unikd_fast.compat.presets import PRESETS, Preset, Target, load
from unikd_fast.io import write_file

DTYPES = (torch.float32, torch.bfloat16)
SEEDS = (0, 1, 2)

_INTRODUCTION = """# Conformance

<!-- Written by `make conformance`; do not edit. -->

How closely each drop-in of `unikd_fast.compat` agrees with what it stands in for, on random inputs: logits normal with
a standard deviation of 3 (for Liger log-probabilities and probabilities of such logits, or hidden states and weights),
seeds {seeds}, the shapes and settings of `unikd_fast/compat/_cases.py`. Gradients are by the student's and by the
teacher's inputs; one that only one side has would be an infinite difference. For `dkd_loss` the teacher is a constant:
the original's gradient for it is NaN, the drop-in's is not.

- **value, gradient**: the largest difference from the original, and in parentheses relative to the largest entry of
  the original's value or gradient.
- **own error**: the largest relative error, value / gradient, against the original in fp64 on the same rounded inputs;
  for Liger, which computes in fp32 at most, against the drop-in in fp64. The drop-ins compute in fp32 whatever the
  inputs, and most originals in the dtype of the inputs: in bf16 the difference is their rounding, as this shows.
  Gradients are rounded to bf16 by both, as are the cross-entropy that some losses add and the logits that
  `LigerFusedLinearJSD` makes.
- "the formula, restated" marks a codebase that no package index holds, or a release too old to install beside the
  others: its formula is restated in `unikd_fast/compat/_published.py`.

PyTorch {torch}, {device}. {liger}

| preset | loss | compared with | inputs | value | gradient | own error, drop-in | own error, original |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    absent = sorted({p.distribution for p in PRESETS.values() if p.distribution and find_spec(p.package) is None})
    if absent:
        sys.exit(f"conformance: not installed: {', '.join(absent)}; run make conformance, or pip install them")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Liger's kernels are imported
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}), plain PyTorch"
    liger = "" if device == "cuda" else "Liger's kernels ran in Triton's interpreter."
    introduction = _INTRODUCTION.format(
        seeds=", ".join(map(str, SEEDS)), torch=torch.__version__.partition("+")[0], device=name, liger=liger
    )
    rows = [
        row(preset_name, preset, target, dtype, device)
        for preset_name, preset in PRESETS.items()
        for target in preset.targets
        for dtype in DTYPES
    ]
    # To a file: what the compared packages say while they load goes to the terminal.
    write_file(Path(sys.argv[1]), introduction + "\n".join(rows) + "\n")


def row(preset_name: str, preset: Preset, target: Target, dtype: torch.dtype, device: str) -> str:
    """Return a line of the table."""
    ours = load(target.replacement)
    theirs = getattr(_published, target.published) if target.published else load(target.places[0])
    other = "the formula, restated" if target.published else f"{preset.distribution} {installed_version(preset)}"
    between, our_error, their_error = compare(ours, theirs, target, dtype, device)
    name = target.replacement.rpartition(":")[2]
    inputs = str(dtype).removeprefix("torch.")
    return (
        f"| {preset_name} | `{name}` | {other} | {inputs} "
        f"| {between.value:.0e} ({between.relative_value:.0e}) | {between.gradient:.0e} "
        f"({between.relative_gradient:.0e}) | {our_error.relative_value:.0e} / {our_error.relative_gradient:.0e} "
        f"| {their_error.relative_value:.0e} / {their_error.relative_gradient:.0e} |"
    )


def compare(
    ours: Any, theirs: Any, target: Target, dtype: torch.dtype, device: str
) -> tuple[Difference, Difference, Difference]:
    """Return the largest differences of ours from theirs, of ours from fp64, and of theirs from fp64."""
    between, our_errors, their_errors = [], [], []
    for case in target.cases:
        for seed in SEEDS:
            settings: dict[str, Any] = {"rounded_to": dtype, "device": device, "seed": seed}
            us = measure(ours, case, computed_in=dtype, **settings)
            them = measure(theirs, case, computed_in=dtype, **settings)
            exact = measure(theirs if target.in_fp64 else ours, case, computed_in=torch.float64, **settings)
            between.append(difference(us, them))
            our_errors.append(difference(us, exact))
            their_errors.append(difference(them, exact))
    return largest(between), largest(our_errors), largest(their_errors)


if __name__ == "__main__":
    main()
