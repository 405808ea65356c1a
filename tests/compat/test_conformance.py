"""The comparison behind docs/conformance.md: the restated formulas, and that it sees what it should."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unikd_fast.compat import _published
from unikd_fast.compat._cases import Case
from unikd_fast.compat._difference import difference, measure
from unikd_fast.compat.conformance import compare, row
from unikd_fast.compat.presets import PRESETS, Target, load

ROOT = Path(__file__).parents[2]
RESTATED = [(name, preset, target) for name, preset in PRESETS.items() for target in preset.targets if target.published]
IN_FP64: dict[str, Any] = {"rounded_to": torch.float64, "computed_in": torch.float64}


@pytest.mark.parametrize(("name", "preset", "target"), RESTATED, ids=lambda x: getattr(x, "replacement", ""))
def test_the_restated_formulas_agree_in_fp64(name: str, preset: object, target: Target) -> None:
    assert target.published is not None
    ours, theirs = load(target.replacement), getattr(_published, target.published)
    for case in target.cases:
        one = difference(measure(ours, case, **IN_FP64), measure(theirs, case, **IN_FP64))
        # Both sum K = 1000 classes in fp64, in a different order; bf16's and fp32's errors are in the document.
        assert one.relative_value < 1e-13 and one.relative_gradient < 1e-12, f"{case.description}, {case.shape}: {one}"


def test_every_loss_is_compared_with_something() -> None:
    for name, preset in PRESETS.items():
        for target in preset.targets:
            assert target.cases and callable(load(target.replacement)), name
            assert (preset.distribution is None) == (target.published is not None), name


def case() -> Case:
    return Case("a case", (4, 5), lambda loss, s, t: loss(s, t))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda s, t: (s * t).sum(), (0.0, 0.0)),
        (lambda s, t: (s * t).sum() * 1.01, (0.01 / 1.01, 0.01 / 1.01)),
        (lambda s, t: (s * t.detach()).sum(), (0.0, math.inf)),  # the teacher's gradient is missing
        (lambda s, t: (s * t).sum() * math.nan, (math.inf, math.inf)),
        (lambda s, t: s * t, (math.inf, None)),  # another shape; the upstream gradient differs with it
        (lambda s, t: (s * t).sum() + s.sum() - s.detach().sum(), (0.0, None)),
    ],
)
def test_difference(other: Any, expected: tuple[float, float | None]) -> None:
    one = difference(measure(lambda s, t: (s * t).sum(), case(), **IN_FP64), measure(other, case(), **IN_FP64))
    assert one.relative_value == pytest.approx(expected[0], rel=1e-9, abs=1e-15)
    if expected[1] is None:
        assert one.relative_gradient > 0.01
    else:
        assert one.relative_gradient == pytest.approx(expected[1], rel=1e-9, abs=1e-15)


def test_rounding_is_no_disagreement() -> None:
    target = PRESETS["rep_distiller"].targets[0]
    between, ours, theirs = compare(
        load(target.replacement), _published.DistillKL, target._replace(cases=target.cases[:2]), torch.bfloat16, "cpu"
    )
    assert ours.relative_value < 1e-6 < 1e-4 < theirs.relative_value  # fp32 inside, against bf16
    assert between.relative_value == pytest.approx(theirs.relative_value, rel=1e-2)


def test_a_row_of_the_table() -> None:
    preset = PRESETS["rep_distiller"]
    target = preset.targets[0]
    text = row("rep_distiller", preset, target._replace(cases=target.cases[:1]), torch.float32, "cpu")
    assert (
        text.startswith("| rep_distiller | `DistillKL` | the formula, restated | float32 | ") and text.count("|") == 9
    )


def test_document_has_a_line_per_loss_and_dtype() -> None:
    lines = (ROOT / "docs/conformance.md").read_text().splitlines()
    for name, preset in PRESETS.items():
        for target in preset.targets:
            loss = target.replacement.rpartition(":")[2]
            for dtype in ("float32", "bfloat16"):
                found = [x for x in lines if x.startswith(f"| {name} | `{loss}` |") and f" | {dtype} | " in x]
                assert len(found) == 1 and "inf" not in found[0], f"{name} {loss} {dtype}: run make conformance"


def test_missing_packages_leave_the_table_unwritten() -> None:
    code = "import sys; sys.modules['trl'] = None; from unikd_fast.compat import conformance; conformance.main()"
    hidden = (
        f"import importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if n == 'trl' else f(n); {code}"
    )
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "trl" in done.stderr and done.stdout == ""


def test_drop_ins_import_no_codebase() -> None:
    code = """
import pkgutil, sys
import unikd_fast.compat as compat
for module in pkgutil.iter_modules(compat.__path__):
    if module.name != "torchdistill_register":
        __import__(f"unikd_fast.compat.{module.name}")
tops = {name.partition(".")[0] for name in sys.modules}
assert not tops & {"torchdistill", "timm", "trl", "liger_kernel", "modelopt", "mmrazor", "mdistiller"}, tops
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_inputs_depend_on_the_seed_alone() -> None:
    seen = []

    def loss(s: Tensor, t: Tensor) -> Tensor:
        seen.append(s.detach())
        return (s * t).sum()

    for seed in (0, 0, 1):
        measure(loss, case(), seed=seed, **IN_FP64)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
