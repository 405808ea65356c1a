"""The same samples through the same steps, at any number of processes and ZeRO stage, also when these change midway."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.real_runs import newest_checkpoint, run, run_ranks, start, wait_for_step, write_config

pytestmark = pytest.mark.slow

GLOBAL, MICRO, STEPS = 16, 4, 12
# BatchNorm sees micro-batches, so these are kept of one size. At this rate a difference of the last bit does not grow.
SETTINGS: dict[str, Any] = {
    "run": {"checkpoint_every_steps": 2},
    "student": {"model": "cifar/resnet8"},
    "train": {
        "total_epochs": 2,
        "global_batch_size": GLOBAL,
        "learning_rate": 0.0005,
        "clip_grad_norm": 0.0,
        "ema_decay": 0.9,
    },
}


def sharded(processes: int, stage: int) -> dict[str, Any]:
    """What must change with the number of processes, and the stage."""
    return {
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "train": {**SETTINGS["train"], "accumulation_steps": GLOBAL // MICRO // processes},
    }


def records(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["total"]) for line in lines if line["kind"] == "train"]


def assert_same_curve(left: list[tuple[int, float]], right: list[tuple[int, float]]) -> None:
    assert [step for step, _ in left] == list(range(1, STEPS + 1)) == [step for step, _ in right]
    # fp32 sums of some ten thousand terms in another order.
    assert all(math.isclose(a, b, rel_tol=2e-5) for (_, a), (_, b) in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The curve of one process that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(write_config(folder, name="whole", **{**SETTINGS, **sharded(1, 0)}))
    assert done.returncode == 0, done.stdout + done.stderr
    curve = records(folder / "whole")
    assert len({loss for _, loss in curve}) == STEPS  # it moves
    return curve


@pytest.mark.parametrize(
    ("processes", "stage"),
    [(2, 1), pytest.param(4, 3, marks=pytest.mark.long), pytest.param(2, 2, marks=pytest.mark.long)],
)
def test_more_ranks_train_alike(tmp_path: Path, whole: list[tuple[int, float]], processes: int, stage: int) -> None:
    config = write_config(tmp_path, name="more", **{**SETTINGS, **sharded(processes, stage)})
    done = run_ranks(config, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_curve(records(tmp_path / "more"), whole)


CHANGES = [
    pytest.param((2, 3), (1, 0), id="2 at stage 3 to 1 at stage 0"),
    pytest.param((1, 0), (4, 1), marks=pytest.mark.long, id="1 at stage 0 to 4 at stage 1"),
    pytest.param((2, 1), (2, 3), marks=pytest.mark.long, id="2 at stage 1 to stage 3"),
    pytest.param((4, 2), (2, 0), marks=pytest.mark.long, id="4 at stage 2 to 2 at stage 0"),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_resumes_with_other_ranks_and_stage(
    tmp_path: Path, whole: list[tuple[int, float]], before: tuple[int, int], after: tuple[int, int]
) -> None:
    config = write_config(tmp_path, name="cut", **{**SETTINGS, **sharded(*before)})
    process = start(config, processes=before[0])
    wait_for_step(tmp_path / "cut", 5, process)  # six steps an epoch
    process.kill()
    saved = newest_checkpoint(tmp_path / "cut")["run"]
    assert saved["world_size"] == before[0] and saved["zero_stage"] == before[1] and saved["step"] < STEPS

    config = write_config(tmp_path, name="cut", **{**SETTINGS, **sharded(*after)})
    done = (
        run(config, "--resume", "auto") if after[0] == 1 else run_ranks(config, "--resume", "auto", processes=after[0])
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_curve(records(tmp_path / "cut"), whole)
