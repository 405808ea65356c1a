"""Training with fused losses and each path of the fusion gives the loss curve of the reference."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.real_runs import config_of, run, train_here, train_records, write_config
from unikd_fast.config import load_config
from unikd_fast.fusion import AdaptiveFeatureFusion
from unikd_fast.methods import unikd

DIGITS: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 16, "train_samples": 200, "num_classes": 10},
    # At higher rates training doubles a difference of the last bit with every step.
    "train": {
        "total_epochs": 4,
        "global_batch_size": 32,
        "accumulation_steps": 1,
        "max_steps": 20,
        "learning_rate": 0.0005,
    },
    "student": {"model": "cifar/resnet8"},
}
METHODS = {
    "unikd": {"distill.method": "unikd", "distill.unikd.teacher_head": "anchored"},
    "kd": {"distill.method": "kd"},
}
IMPLS = ("reference", "fused", "auto")
TERMS = {
    "unikd": ("total", "ce", "feature_kl", "logit_kl", "anchor"),
    "kd": ("total", "ce", "logit_kl"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one comparison of all the runs."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "needs the interpreter"
    home = tmp_path_factory.mktemp("fused_losses")
    runs = {
        f"{method}-{impl}": settings | {"loss.impl": impl} for method, settings in METHODS.items() for impl in IMPLS
    }
    done = run(write_config(home, name="losses", compare={"seeds": [0], "runs": runs}, **DIGITS))
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "losses" / "seed-0"


def curve(trained: Path, method: str, impl: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (trained / f"{method}-{impl}" / "metrics.jsonl").read_text().splitlines()]
    return [{name: x[name] for name in TERMS[method]} for x in lines if x["kind"] == "train"]


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_fused_losses_match_the_reference_curve(trained: Path, method: str) -> None:
    plain, fused, auto = (curve(trained, method, impl) for impl in IMPLS)
    assert len(plain) == 20
    assert len({x["total"] for x in plain}) == 20  # it trains
    for name in TERMS[method]:  # the loss to 1e-4; terms of it that are small next to it to 1e-4 of its size
        values = [[x[name] for x in run] for run in (plain, fused)]
        assert values[1] == pytest.approx(values[0], rel=1e-4, abs=0 if name == "total" else 1e-4), name
    assert auto == plain  # without a GPU "auto" is the plain one
    assert fused != plain  # and the other really was another


PLAIN = ("stagewise", "reference")  # which the others are compared with
CURVE_TERMS = ("total", "ce", "feature_kl", "logit_kl")  # and the anchor, where the head trains along
WHOLE: dict[str, Any] = {"teacher_head": "anchored"}
SMALL: dict[str, Any] = {"teacher_head": "anchored", "max_levels": 2, "width": 16, "alpha_ramp_epochs": 0.0}
CASES = [
    pytest.param(WHOLE, 12, ("collapsed", "reference"), id="collapsed"),
    pytest.param({"teacher_head": "prefit", "head_steps": 2}, 12, ("collapsed", "reference"), id="prefit"),
    pytest.param(SMALL, 2, ("collapsed", "fused"), id="collapsed kernels", marks=pytest.mark.long),
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
        return [{term: record[term] for term in record if term in (*CURVE_TERMS, "anchor")} for record in records]

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
