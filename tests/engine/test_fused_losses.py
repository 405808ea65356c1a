"""Training with the fused losses: interpreted on a CPU, natively on a GPU, it is the run with the plain ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.real_runs import run, write_config

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


@pytest.mark.slow
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
