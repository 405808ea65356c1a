"""Training with the fused losses: interpreted on a CPU, natively on a GPU, it is the run with the plain ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from real_runs import run, write_config

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
TERMS = ("total", "ce", "feature_kl", "logit_kl", "anchor")


def curves(folder: Path, method: dict[str, Any], impl: str) -> list[dict[str, float]]:
    config = write_config(folder, name=impl, distill=method, loss={"impl": impl}, **DIGITS)
    done = run(config)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / impl / "metrics.jsonl").read_text().splitlines()]
    return [{name: x[name] for name in TERMS} for x in lines if x["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"method": "unikd", "teacher_head": "anchored"}, {"method": "kd"}], ids=str)
def test_fused_losses_follow_the_plain_loss_curve_on_digits(tmp_path: Path, method: dict[str, Any]) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "needs the interpreter"
    plain, fused, auto = (curves(tmp_path, method, impl) for impl in ("reference", "fused", "auto"))
    assert len(plain) == 20
    assert len({x["total"] for x in plain}) == 20  # it trains
    for name in TERMS:  # the loss to 1e-4; terms of it that are small next to it to 1e-4 of its size
        values = [[x[name] for x in run] for run in (plain, fused)]
        assert values[1] == pytest.approx(values[0], rel=1e-4, abs=0 if name == "total" else 1e-4), name
    assert auto == plain  # without a GPU "auto" is the plain one
    assert fused != plain  # and the other really was another
