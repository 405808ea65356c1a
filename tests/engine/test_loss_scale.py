"""The loss scale of fp16: halved by an overflow, doubled after a while, kept in checkpoints; at every ZeRO stage."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.plain_engine import PlainEngine
from support.real_runs import LAUNCHERS, ROOT, newest_checkpoint, write_config
from unikd_fast.engine.gradients import GradientWatch, LossScale


def test_an_overflow_halves_and_patience_doubles() -> None:
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


def test_it_does_not_grow_for_ever() -> None:
    scale = LossScale(growth_interval=1)
    for _ in range(100):
        scale.update(False)
    assert scale.value == 2.0**24


def test_gradients_are_those_of_the_loss_and_an_overflow_changes_nothing() -> None:
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


# A gradient that fits fp16 with a scale of 1 does not with this one: 65504 is its largest number.
SCRIPT = """
import sys
from unikd_fast.cli import main
from unikd_fast.engine.gradients import LossScale
LossScale.__init__.__defaults__ = (2.0**20, 3)
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "processes"),
    [
        (0, 1),
        pytest.param(1, 2, marks=pytest.mark.long),
        pytest.param(2, 2, marks=pytest.mark.long),
        pytest.param(3, 2, marks=pytest.mark.long),
    ],
)
def test_a_run_finds_its_scale_and_goes_on_with_it(tmp_path: Path, stage: int, processes: int) -> None:
    script = tmp_path / "large_scale.py"
    script.write_text(SCRIPT)
    settings: dict[str, Any] = {"learning_rate": 0.001, "accumulation_steps": 1, "ema_decay": None, "precision": "fp16"}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}

    def records(name: str, steps: int, *arguments: str) -> list[dict[str, Any]]:
        config = write_config(
            tmp_path,
            name=name,
            student={"model": "cifar/resnet8"},
            deepspeed={"zero_optimization": {"stage": stage}},
            train=settings,
        )
        command = [*LAUNCHERS["torchrun"], str(processes), str(script), "--config", str(config), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
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
