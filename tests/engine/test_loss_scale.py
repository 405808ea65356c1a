"""The loss scale of fp16: halved by an overflow, doubled after a while, kept in checkpoints; at every ZeRO stage."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from support.plain_engine import PlainEngine
from support.ranks import Ranks
from support.real_runs import in_this_process, newest_checkpoint, write_config
from unikd_fast.cli import main
from unikd_fast.engine.gradients import GradientWatch, LossScale


def test_an_overflow_halves_and_growth_doubles() -> None:
    scale = LossScale(8.0, growth_interval=3)
    values = []
    for overflowed in (True, False, False, True, False, False, False, False):
        scale.update(overflowed)
        values.append(scale.value)
    assert values == [4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 4.0, 4.0]
    again = LossScale(growth_interval=3)
    again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    for each in (scale, again):
        each.update(False)
        each.update(False)
    assert scale.value == again.value == 8.0


def test_the_scale_is_bounded() -> None:
    scale = LossScale(growth_interval=1)
    for _ in range(100):
        scale.update(False)
    assert scale.value == 2.0**24


def test_an_overflow_leaves_the_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    engine = PlainEngine(module, lr=0.25)
    scale = LossScale(2.0**10)
    watch = GradientWatch(engine, skip=False, scale=scale)
    for factor, expected in ((1.0, 0.75), (math.inf, 0.75), (2.0, 0.25)):
        module.weight.grad = None
        scale.scaled(factor * module(torch.ones(1, 1)).sum()).backward()
        watch.before_update()
        engine.optimizer.step()
        assert watch.after_update() == math.isinf(factor)
        assert module.weight.item() == expected
    assert scale.value == 2.0**9 and watch.skipped_steps == 1


def scaled_by_more(config: Path) -> int:
    """Train with a first scale that makes gradients too large for fp16, whose largest number is 65504."""
    with patch.object(LossScale.__init__, "__defaults__", (2.0**20, 3)):
        return main(["train", "--config", str(config)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "processes"),
    [
        pytest.param(0, 1, marks=pytest.mark.long),
        pytest.param(1, 2, marks=pytest.mark.long),
        pytest.param(2, 2, marks=pytest.mark.long),
        pytest.param(3, 2, marks=pytest.mark.long),
    ],
)
def test_a_run_finds_its_scale(tmp_path: Path, stage: int, processes: int) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.001, "accumulation_steps": 1, "ema_decay": None, "precision": "fp16"}

    def records(name: str, steps: int) -> list[dict[str, Any]]:
        config = write_config(
            tmp_path,
            name=name,
            student={"model": "cifar/resnet8"},
            deepspeed={"zero_optimization": {"stage": stage}},
            train=settings,
        )
        body = partial(scaled_by_more, config)
        done = in_this_process(body) if processes == 1 else Ranks(body, tmp_path, processes=processes).done()
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found = [line for line in lines if line["kind"] == "train"]
        assert len(found) == steps
        return found

    whole = records("whole", 18)
    scales = [line["loss_scale"] for line in whole]
    assert scales[0] == 2.0**19 and whole[0]["skipped_steps"] == 1  # the first step overflowed
    assert max(scales[i + 1] / scales[i] for i in range(17)) == 2.0  # and later it grew again
    first_good = next(i for i in range(1, 18) if whole[i]["skipped_steps"] == whole[i - 1]["skipped_steps"])
    assert first_good < 12  # from 2^20 to where 65504 is enough
    assert all(math.isfinite(line["total"]) for line in whole)
    assert newest_checkpoint(tmp_path / "whole")["run"]["loss_scale"]["value"] == scales[-1]
