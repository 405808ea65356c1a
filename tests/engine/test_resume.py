"""Runs that are killed and continue: bit for bit, with other ranks and ZeRO stages, after random kills."""

import json
import math
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from support.real_runs import (
    newest_checkpoint,
    run,
    run_ranks,
    start,
    start_launcher,
    train_records,
    wait_for_step,
    write_config,
)
from unikd_fast.errors import LostProcess

pytestmark = pytest.mark.slow

CASES: list[Any] = [
    pytest.param(1, 0, 2, id="one process, stage 0"),
    pytest.param(2, 0, 3, marks=pytest.mark.long, id="two processes, stage 0"),
    pytest.param(2, 1, 3, marks=pytest.mark.long, id="two processes, stage 1"),
    pytest.param(2, 2, 3, marks=pytest.mark.long, id="two processes, stage 2"),
    # A step takes a second or two here: no third epoch.
    pytest.param(2, 3, 2, marks=pytest.mark.long, id="two processes, stage 3"),
]


def assert_same_run(left: Path, right: Path) -> None:
    assert train_records(left) == train_records(right)
    ours, theirs = load_file(left / "student.safetensors"), load_file(right / "student.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "stage", "epochs"), CASES)
def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, processes: int, stage: int, epochs: int) -> None:
    sections: dict[str, Any] = {
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "train": {"total_epochs": epochs},
    }
    whole = write_config(tmp_path, name="whole", **sections)
    done = run_ranks(whole, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr

    cut = write_config(tmp_path, name="cut", **sections)
    process = start(cut, processes=processes)
    wait_for_step(tmp_path / "cut", 8, process)  # six steps an epoch: inside the second one
    process.kill()
    saved = newest_checkpoint(tmp_path / "cut")
    assert 6 <= saved["run"]["step"] < 6 * epochs
    assert not (tmp_path / "cut" / "result.json").exists()

    done = run_ranks(cut, "--resume", "auto", processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


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
    [pytest.param(*case, marks=pytest.mark.long) for case in ((2, 1), (4, 3), (2, 2))],
)
def test_more_ranks_train_alike(tmp_path: Path, whole: list[tuple[int, float]], processes: int, stage: int) -> None:
    config = write_config(tmp_path, name="more", **{**SETTINGS, **sharded(processes, stage)})
    done = run_ranks(config, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_curve(records(tmp_path / "more"), whole)


CHANGES = [
    pytest.param((2, 3), (1, 0), marks=pytest.mark.long, id="2 at stage 3 to 1 at stage 0"),
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


LIMIT_S = 60.0
QUICK: dict[str, Any] = {"student": {"model": "cifar/resnet8"}, "train": {"total_epochs": 4}}


def trainers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The processes that train, by rank: those that run the script and start nothing that does."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            line = child.cmdline()
            if len(line) > 2 and any(part.endswith("launch_distill.py") for part in line[1:3]):
                found.append((int(child.environ().get("RANK", "0")), child))
        except psutil.Error:
            continue
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def ended(process: "subprocess.Popen[str]") -> str:
    began = time.monotonic()
    try:
        output, _ = process.communicate(timeout=3 * LIMIT_S)
    finally:
        kill_quietly(process)
    assert time.monotonic() - began < LIMIT_S
    return output


def kill_quietly(process: "subprocess.Popen[str]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


LOST = "another process of this run ended, or did not answer"


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    process = start(write_config(tmp_path, name="killed", **QUICK), processes=2)
    wait_for_step(tmp_path / "killed", 4, process)
    process.send_signal(signal.SIGKILL, 1)
    done = process.done(LIMIT_S)
    assert done.returncode == LostProcess.exit_code
    assert LOST in done.stderr and "with --resume auto" in done.stderr
    assert newest_checkpoint(tmp_path / "killed")["run"]["step"] >= 2


@pytest.mark.long
@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 1), ("deepspeed", 0)])
def test_a_launcher_reports_a_killed_rank(tmp_path: Path, launcher: str, rank: int) -> None:
    config = write_config(tmp_path, name="killed", **QUICK)
    process = start_launcher(config, launcher=launcher, processes=2)
    try:
        wait_for_step(tmp_path / "killed", 4, process)
        trainers(process)[rank].kill()
        output = ended(process)
    finally:
        kill_quietly(process)
    assert process.returncode not in (0, None)
    # torchrun lets the others speak; DeepSpeed's launcher ends them at once, and says itself who was killed.
    told = LOST in output and "with --resume auto" in output
    assert told or (launcher == "deepspeed" and "exits with return code = -9" in output)
    assert newest_checkpoint(tmp_path / "killed")["run"]["step"] >= 2


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_ranks(write_config(folder, name="whole", **QUICK))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "whole"


@pytest.mark.parametrize(("rounds", "seed"), [pytest.param(5, seed, marks=pytest.mark.long) for seed in range(2, 6)])
def test_random_kills_do_not_change_the_result(tmp_path: Path, uninterrupted: Path, rounds: int, seed: int) -> None:
    """A random process at a random moment, again and again, until the run is through all the same."""
    cut = write_config(tmp_path, name="cut", **QUICK)
    chance = random.Random(seed)
    for _ in range(rounds):
        process = start(cut, "--resume", "auto", processes=2)
        # Anywhere between its start and its end, after each of whose steps there is a checkpoint.
        wait_for_step(tmp_path / "cut", chance.randint(1, 24), process)
        time.sleep(chance.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL, chance.randrange(2))
        time.sleep(chance.uniform(0.0, 1.0))
        process.kill()  # as launchers do: one that still waits for the others to join would do so for ten minutes
    done = run_ranks(cut, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(uninterrupted, tmp_path / "cut")
