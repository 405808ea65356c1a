"""step_time.json: where the time of a step goes, measured in the run itself and without changing it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support.captured_runs import CHANGING, config_of, curve
from support.real_runs import train_here
from unikd_fast.engine import cuda_graph as capture
from unikd_fast.engine import step as steps
from unikd_fast.engine.timing import COUNT, FIRST, StepClock
from unikd_fast.report.run_files import STEP_TIME, read_step_time

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands where its entry says."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_parts_are_summed_and_averaged(tmp_path: Path, seconds: list[float]) -> None:
    clock = StepClock(CPU)
    for step in range(FIRST + COUNT + 3):
        slow = 1.0 if FIRST <= step < FIRST + COUNT else 100.0  # those before and after are not measured
        clock.start()
        for _ in range(2):
            for part, took in (("data", 1), ("teacher", 2), ("student_forward", 3), ("loss", 4), ("backward", 5)):
                seconds[0] += slow * took / 1000
                clock.mark(part)
        seconds[0] += slow * 0.006
        clock.mark("optimiser")
        seconds[0] += slow * 9.0  # evaluations and the like, between two steps
    clock.write(tmp_path)
    found = read_step_time(tmp_path)
    assert found is not None
    assert found[:-1] == pytest.approx((2, 4, 6, 8, 10, 6))
    assert found.hardware == f"CPU, {torch.get_num_threads()} threads"


def test_it_is_written_once_all_steps_are_timed(tmp_path: Path) -> None:
    clock = StepClock(CPU)
    for _ in range(FIRST + COUNT - 1):
        clock.start()
        clock.mark("data")
    clock.write(tmp_path)
    assert not (tmp_path / STEP_TIME).exists()
    clock.start()
    clock.mark("data")
    clock.write(tmp_path)
    (tmp_path / STEP_TIME).unlink()
    clock.start()
    clock.mark("data")
    clock.write(tmp_path)
    assert not (tmp_path / STEP_TIME).exists()


def test_timing_does_not_change_the_run(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, weights, "timed", "kd")
    timed = train_here(config)
    found = read_step_time(timed)
    assert found is not None
    assert all(milliseconds > 0 for milliseconds in found[:-1])
    assert found.backward_ms > found.loss_ms

    class Silent(StepClock):
        def start(self) -> None:
            pass

    monkeypatch.setattr("unikd_fast.engine.trainer.StepClock", Silent)
    silent = train_here(config_of(tmp_path, weights, "silent", "kd"))
    assert not (silent / STEP_TIME).exists()
    assert curve(silent) == curve(timed)


def test_time_goes_to_the_right_part(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that sleeps shows in its own part alone."""
    whole = steps.train_step

    def asleep(engine: Any, teacher: Any, *arguments: Any, **options: Any) -> Any:
        def sleeps(images: Any) -> Any:
            time.sleep(0.05)
            return teacher(images)

        return whole(engine, sleeps, *arguments, **options)

    monkeypatch.setattr(steps, "train_step", asleep)
    found = read_step_time(train_here(config_of(tmp_path, weights, "asleep", "kd")))
    assert found is not None
    assert found.teacher_ms > 50
    assert found.data_ms < 25 and found.loss_ms < 25


def test_captured_steps_have_only_a_total(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "device_obstacles", lambda processes: iter(()))
    folder = train_here(config_of(tmp_path, weights, "captured", "kd"))
    content = json.loads((folder / STEP_TIME).read_text())
    assert content.keys() == {"captured", "data_ms", "step_ms", "hardware"}
    assert content["step_ms"] > content["data_ms"] > 0
    assert read_step_time(folder) is None


def test_a_short_run_writes_none(tmp_path: Path, weights: Path) -> None:
    train = {**CHANGING["train"], "max_steps": FIRST + COUNT - 1}
    assert not (train_here(config_of(tmp_path, weights, "short", "none", train=train)) / STEP_TIME).exists()
