"""A loss or gradient that is not finite: where it was is said, or the step is left out and counted."""

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from support.long_rounds import long
from support.plain_engine import PlainEngine
from support.ranks import Done, Ranks
from support.real_runs import ALONE, in_this_process, write_config
from unikd_fast.cli import main
from unikd_fast.engine.gradients import GradientWatch, largest_entries
from unikd_fast.engine.metrics import LossMeter
from unikd_fast.engine.step import train_step
from unikd_fast.errors import NonFiniteLoss
from unikd_fast.values import Batch, Loss

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def backward(module: nn.Sequential, factor: float) -> None:
    for parameter in module.parameters():
        parameter.grad = None
    module(torch.ones(1, 2)).sum().mul(factor).backward()


@pytest.fixture
def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def loss(total: float) -> Loss:
    value = torch.tensor(total)
    return Loss(value, {"ce": value})


def test_the_first_non_finite_gradients_are_named(module: nn.Sequential) -> None:
    watch = GradientWatch(PlainEngine(module, **OPTIONS), skip=False)
    meter = LossMeter(ALONE, ["ce"], watch)
    for step in range(6):
        backward(module, 1.0)
        if step in (3, 4):
            assert module[1].weight.grad is not None and module[0].bias.grad is not None
            (module[1].weight if step == 3 else module[0].bias).grad.fill_(math.nan if step == 3 else math.inf)
        watch.before_update()
        assert bool(watch.finite) == (step not in (3, 4))
        meter.update(loss(1.0), step)
    assert watch.worst(2).startswith(
        "1 of 4 parameters have gradients that are not finite; largest entries: 1.weight nan, "
    )
    with pytest.raises(NonFiniteLoss, match=r"^gradients are not finite at step 3 on .* 0: total 1, .*1\.weight nan"):
        meter.read()
    with pytest.raises(NonFiniteLoss):
        meter.check()


def test_largest_entries_are_infinity_norms() -> None:
    rows = [[-3.0, 2.0], [0.0, -0.0], [1.0, -math.inf], [math.inf, math.nan]]
    kinds = (torch.float32, torch.bfloat16, torch.complex64)
    tensors = [torch.tensor(row).to(kind) for kind in kinds for row in rows]
    for some in (tensors[:8], tensors):  # complex numbers have no order
        wanted = torch.stack([torch.linalg.vector_norm(tensor, math.inf).float() for tensor in some])
        torch.testing.assert_close(largest_entries(some), wanted, rtol=0, atol=0, equal_nan=True)


def test_a_non_finite_loss_is_reported_with_gradients(module: nn.Sequential) -> None:
    watch = GradientWatch(PlainEngine(module, **OPTIONS), skip=False)
    meter = LossMeter(ALONE, ["ce"], watch)
    backward(module, math.nan)
    watch.before_update()
    meter.update(loss(math.inf), 5)
    with pytest.raises(NonFiniteLoss, match=r"^loss is not finite at step 5 .*: total inf, .*; 4 of 4 parameters"):
        meter.read()


def test_finite_steps_report_nothing(module: nn.Sequential) -> None:
    watch = GradientWatch(PlainEngine(module, **OPTIONS), skip=False)
    meter = LossMeter(ALONE, ["ce"], watch)
    for step in range(3):
        backward(module, 1e30)
        watch.before_update()
        meter.update(loss(float(step)), step)
    assert meter.read()["total"] == 1.0
    assert watch.worst() == ""


def test_a_skipped_step_changes_nothing(module: nn.Sequential) -> None:
    engine = PlainEngine(module, **OPTIONS)
    optimizer = engine.optimizer
    watch = GradientWatch(engine, skip=True)
    meter = LossMeter(ALONE, ["ce"], watch, skip=True)
    for step, factor in enumerate((1.0, math.nan, 1.0)):
        before = [p.detach().clone() for p in module.parameters()]
        momentum = [optimizer.state[p].get("momentum_buffer", torch.zeros(())).clone() for p in module.parameters()]
        backward(module, factor)
        watch.before_update()
        optimizer.step()
        assert watch.after_update() == (step == 1)
        meter.update(loss(float(step) * factor), step)
        same = [torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
        assert all(same) if step == 1 else not any(same)
        if step == 1:
            kept = [optimizer.state[p]["momentum_buffer"] for p in module.parameters()]
            assert all(torch.equal(a, b) for a, b in zip(momentum, kept, strict=True))
    assert watch.skipped_steps == 1
    assert meter.read()["total"] == 1.0  # of steps 0 and 2
    meter.check()


STAGES = [
    pytest.param(0, 1, id="stage 0"),
    pytest.param(1, 2, marks=pytest.mark.long, id="stage 1"),
    pytest.param(3, 2, marks=pytest.mark.long, id="stage 3"),
]


def poisoned(config: Path, steps: set[int]) -> int:
    """Train on images that are poisoned at these steps, counted from 1, on the first process alone."""
    count = 0

    def step(engine: Any, teacher: Any, method: Any, batch: Batch, target: Any = None, **options: Any) -> Any:
        nonlocal count
        count += options["update"]
        if count in steps and os.environ.get("RANK", "0") == "0":
            batch = batch._replace(images=batch.images * float("nan"))
        return train_step(engine, teacher, method, batch, target, **options)

    with patch("unikd_fast.engine.step.train_step", step):
        return main(["train", "--config", str(config)])


def poisoned_run(folder: Path, steps: set[int], stage: int, processes: int, **train: Any) -> Done:
    config = write_config(
        folder,
        name="poisoned",
        student={"model": "cifar/resnet8"},
        deepspeed={"zero_optimization": {"stage": stage}},
        train={"learning_rate": 0.001, "accumulation_steps": 1, "ema_decay": None, **train},
    )
    body = partial(poisoned, config, steps)
    return in_this_process(body) if processes == 1 else Ranks(body, folder, processes=processes).done()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes"), STAGES)
def test_a_run_skips_and_counts_steps(tmp_path: Path, stage: int, processes: int) -> None:
    done = poisoned_run(tmp_path, {3, 8}, stage, processes, nonfinite="skip")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "poisoned" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line.get("skipped_steps", 0) for line in train] == [0] * 2 + [1] * 5 + [2] * 11
    assert all(math.isfinite(line["total"]) for line in train)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes"), [STAGES[0], long(1, 2), long(3, 2)])
def test_a_run_stops_and_names_the_step(tmp_path: Path, stage: int, processes: int) -> None:
    done = poisoned_run(tmp_path, {3}, stage, processes)
    assert done.returncode != 0
    assert "loss is not finite at step 2 on process 0: total nan" in done.stderr  # steps count from 0
    assert "parameters have gradients that are not finite; largest entries: network." in done.stderr


@pytest.mark.slow
def test_a_run_that_skips_most_steps_stops(tmp_path: Path) -> None:
    done = poisoned_run(tmp_path, set(range(3, 99)), 0, 1, nonfinite="skip")
    assert done.returncode != 0
    assert (
        "10 steps in a row were skipped (train.nonfinite = skip); the first: loss is not finite at step 2"
        in done.stderr
    )
