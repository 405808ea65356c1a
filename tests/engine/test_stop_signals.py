"""SIGTERM and Ctrl-C: the run saves and ends, all its processes at the same step."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.real_runs import (
    ALONE,
    newest_checkpoint,
    run_ranks,
    start,
    start_launcher,
    wait_for_step,
    write_config,
)
from unikd_fast.command import run_command
from unikd_fast.engine.distributed import StopSignal

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long),  # below with two processes
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGHUP, id="SIGHUP", marks=pytest.mark.long),
    ],
)
def test_a_stop_signal_saves_then_exits(tmp_path: Path, number: int) -> None:
    config = write_config(tmp_path, name="stopped", run={"log_every_steps": 1, "checkpoint_every_steps": None})
    process = start(config)
    wait_for_step(tmp_path / "stopped", 2, process)
    process.send_signal(number)
    assert process.wait(60) == 128 + number, process.said()
    output = process.said()
    saved = newest_checkpoint(tmp_path / "stopped")
    assert f"stopped at step {saved['run']['step']}" in output
    assert 2 <= saved["run"]["step"] < 18


@pytest.mark.parametrize(
    ("number", "loader"),
    [
        pytest.param(signal.SIGTERM, "torchvision", id="SIGTERM-torchvision", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "dali", id="Ctrl-C-dali", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "dali", id="SIGTERM-dali", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "torchvision", id="Ctrl-C-torchvision", marks=pytest.mark.long),
    ],
)
def test_a_stop_signal_to_workers_too_still_saves(tmp_path: Path, number: int, loader: str) -> None:
    """Ctrl-C on a terminal, and DeepSpeed's launcher, signal every process of the run."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 4)):
        for index in range(2 * count):
            folder = tmp_path / "data" / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    root = str(tmp_path / "data")
    data = {"name": "image_folder", "root": root, "loader": loader, "num_classes": None, "workers": 2}
    config = write_config(
        tmp_path, name="files", data=data, run={"checkpoint_every_steps": None}, train={"total_epochs": 9}
    )
    process = start(config)
    wait_for_step(tmp_path / "files", 2, process)
    process.signal_groups(number)
    assert process.wait(60) == 128 + number, process.said()
    assert "stopped at step" in process.said()
    assert newest_checkpoint(tmp_path / "files")["run"]["step"] >= 2


def test_a_hangup_asks_to_stop_except_under_nohup() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with StopSignal(ALONE) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.agreed() == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a program
    try:
        with StopSignal(ALONE) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agreed() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_in_a_lock_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever waits for a thread holds no lock meanwhile, and Ctrl-C makes the release of it fail."""
    gate = threading.Condition()

    def waiting() -> int:
        with StopSignal(ALONE) as stop, gate:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked == signal.SIGINT
            gate.release()
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not interrupted")

    assert run_command("unikd train", waiting) == 130
    assert capsys.readouterr().err == "unikd train: error: stopped by Ctrl-C\n"


@pytest.mark.long
def test_two_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    """torchrun and deepspeed signal one process after another; both must still save together."""
    config = write_config(
        tmp_path,
        name="stopped",
        run={"checkpoint_every_steps": None},
        student={"model": "cifar/resnet8"},
        train={"total_epochs": 9, "max_steps": 20},
    )
    process = start(config, processes=2)
    wait_for_step(tmp_path / "stopped", 2, process)
    process.send_signal(signal.SIGTERM, 1)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM, 0)
    assert process.wait(90) == 143
    assert_stopped(tmp_path / "stopped", process.said())
    done = run_ranks(config, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr


def assert_stopped(folder: Path, output: str) -> None:
    saved = newest_checkpoint(folder)
    assert f"stopped at step {saved['run']['step']}" in output
    assert len(saved["processes"]) == 2


@pytest.mark.long
def test_a_stopped_launcher_lets_its_ranks_save(tmp_path: Path) -> None:
    config = write_config(tmp_path, name="stopped", run={"log_every_steps": 1, "checkpoint_every_steps": None})
    process = start_launcher(config, launcher="deepspeed", processes=2)
    wait_for_step(tmp_path / "stopped", 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert_stopped(tmp_path / "stopped", output)
