"""Training with each way of pooling AFF: stage-wise or collapsed, plain or with kernels, it is the same run.

The kernels are interpreted on a CPU, which takes a second a step where training itself takes milliseconds: they get two
small levels and few steps.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.real_runs import config_of, train_here, train_records
from unikd_fast.config import load_config
from unikd_fast.fusion import AdaptiveFeatureFusion
from unikd_fast.methods import unikd

PLAIN = ("stagewise", "reference")  # which the others are compared with
TERMS = ("total", "ce", "feature_kl", "logit_kl")  # and the anchor, where the head trains along
WHOLE: dict[str, Any] = {"teacher_head": "anchored"}
SMALL: dict[str, Any] = {"teacher_head": "anchored", "max_levels": 2, "width": 16, "alpha_ramp_epochs": 0.0}
CASES = [
    pytest.param(WHOLE, 12, ("collapsed", "reference"), id="collapsed"),
    pytest.param({"teacher_head": "prefit", "head_steps": 2}, 12, ("collapsed", "reference"), id="prefit"),
    pytest.param(SMALL, 2, ("collapsed", "fused"), id="collapsed kernels", marks=pytest.mark.slow),
    pytest.param(SMALL, 4, ("stagewise", "fused"), id="stage-wise kernels", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("distill", "steps", "way"), CASES)
def test_fusion_paths_match_the_reference_curve(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    distill: dict[str, Any],
    steps: int,
    way: tuple[str, str],
) -> None:
    def curve(name: str, path: str, impl: str) -> list[dict[str, float]]:
        monkeypatch.setattr(unikd, "AdaptiveFeatureFusion", partial(AdaptiveFeatureFusion, path=path, impl=impl))
        train = {"total_epochs": 4, "max_steps": steps, "global_batch_size": 8, "learning_rate": 0.0005}
        config = config_of(tmp_path, weights, name, distill=distill, train=train)
        records = train_records(train_here(load_config(config)))
        return [{term: record[term] for term in record if term in (*TERMS, "anchor")} for record in records]

    expected, found = ([x for x in curve(name, *how) if x] for name, how in (("plain", PLAIN), ("other", way)))
    expected, found = ([x for x in run if "total" in x] for run in (expected, found))
    assert len(expected) == len(found) == steps
    assert len({x["total"] for x in expected}) == steps  # it trains
    # The loss to 1e-4, and what the fusion is in for; what is small next to it to 1e-4 of its size.
    for term in expected[0]:
        values = [[x[term] for x in run] for run in (expected, found)]
        small = 0 if term in ("total", "feature_kl") else 1e-4 * min(x["total"] for x in expected)
        assert values[1] == pytest.approx(values[0], rel=1e-4, abs=small), term
    assert found != expected  # and the way really was another
