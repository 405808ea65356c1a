"""A killed run continues bit for bit: one and two processes, ZeRO 0 and 1, mid-epoch."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_runs import kill_group, run, start, train_records, wait_for_step, write_config
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

CASES: list[Any] = [
    pytest.param("python", 1, 0, id="one process, stage 0"),
    pytest.param("deepspeed", 2, 0, id="two processes, stage 0"),
    pytest.param("deepspeed", 2, 1, id="two processes, stage 1"),
]


def assert_same_weights(left: Path, right: Path) -> None:
    a, b = load_file(left), load_file(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


@pytest.mark.parametrize(("launcher", "processes", "stage"), CASES)
def test_killed_mid_epoch_and_resumed_equals_uninterrupted(
    tmp_path: Path, launcher: str, processes: int, stage: int
) -> None:
    deepspeed = {"zero_optimization": {"stage": stage}}
    whole = write_config(tmp_path, name="whole", deepspeed=deepspeed)
    done = run(whole, launcher=launcher, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr

    cut = write_config(tmp_path, name="cut", deepspeed=deepspeed)
    process = start(cut, launcher=launcher, processes=processes)
    wait_for_step(tmp_path / "cut", 8, process)  # six steps an epoch: inside the second one
    kill_group(process, signal.SIGKILL)
    process.wait()
    saved = torch.load(tmp_path / "cut" / "checkpoints" / "last.pt", weights_only=True)
    assert 7 <= saved["step"] < 18
    assert not (tmp_path / "cut" / "result.json").exists()

    done = run(cut, "--resume", "auto", launcher=launcher, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(tmp_path / "whole" / "student.safetensors", tmp_path / "cut" / "student.safetensors")
    assert train_records(tmp_path / "whole") == train_records(tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stop_signal_saves_then_exits(tmp_path: Path, number: int) -> None:
    config = write_config(tmp_path, name="stopped", run={"log_every_steps": 1, "checkpoint_every_steps": None})
    process = start(config)
    wait_for_step(tmp_path / "stopped", 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    saved = torch.load(tmp_path / "stopped" / "checkpoints" / "last.pt", weights_only=True)
    assert f"stopped at step {saved['step']}" in output
    assert 2 <= saved["step"] < 18


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stop_signal_to_decoding_processes_as_well_still_saves(tmp_path: Path, number: int, loader: str) -> None:
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
    kill_group(process, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "stopped at step" in output
    assert (tmp_path / "files" / "checkpoints" / "last.pt").exists()


def test_two_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    """torchrun and deepspeed signal one process after another; both must still save together."""
    config = write_config(tmp_path, name="stopped", run={"log_every_steps": 1, "checkpoint_every_steps": None})
    process = start(config, launcher="deepspeed", processes=2)
    wait_for_step(tmp_path / "stopped", 2, process)
    kill_group(process, signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    saved = torch.load(tmp_path / "stopped" / "checkpoints" / "last.pt", weights_only=True)
    assert f"stopped at step {saved['step']}" in output
    assert len(saved["processes"]) == 2

    done = run(config, "--resume", "auto", launcher="deepspeed", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
