"""A process that dies ends the whole run within a minute, with the cause, and the run goes on from its checkpoint."""

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
    run_ranks,
    start,
    start_launcher,
    train_records,
    wait_for_step,
    write_config,
)
from unikd_fast.errors import LostProcess

pytestmark = pytest.mark.slow

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


def assert_same_run(left: Path, right: Path) -> None:
    assert train_records(left) == train_records(right)
    ours, theirs = load_file(left / "student.safetensors"), load_file(right / "student.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


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
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_ranks(write_config(folder, name="whole", **QUICK))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "whole"


@pytest.mark.parametrize(
    ("rounds", "seed"), [(1, 1), *(pytest.param(5, seed, marks=pytest.mark.long) for seed in range(2, 6))]
)
def test_random_kills_do_not_change_the_result(tmp_path: Path, whole: Path, rounds: int, seed: int) -> None:
    """A random process at a random moment, again and again, until the run is through all the same."""
    cut = write_config(tmp_path, name="cut", **QUICK)
    chance = random.Random(seed)
    for _ in range(rounds):
        process = start(cut, "--resume", "auto", processes=2)
        # Anywhere between its start and its end, after each of whose steps there is a checkpoint.
        wait_for_step(tmp_path / "cut", chance.randint(1, 24), process)
        time.sleep(chance.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL, chance.randrange(2))
        process.wait(LIMIT_S)
    done = run_ranks(cut, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(whole, tmp_path / "cut")
