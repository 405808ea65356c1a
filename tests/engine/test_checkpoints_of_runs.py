"""Checkpoints of whole runs: saved once, on full disks, damaged; and a lack of memory."""

import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from support.exported_runs import short
from support.ranks import Ranks
from support.real_runs import (
    ALONE,
    merged,
    newest_checkpoint,
    run,
    train_here,
    train_records,
    write_config,
)
from support.small_disks import small_disk
from unikd_fast.cli import main
from unikd_fast.engine import step as step_module
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.checkpoint import CheckpointWriter, checkpoint_name
from unikd_fast.engine.distributed import StopSignal
from unikd_fast.engine.step import train_step
from unikd_fast.engine.trainer import Trainer
from unikd_fast.errors import Interrupted
from unikd_fast.values import Batch

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "student": {"model": "cifar/resnet8"},
    "train": {"total_epochs": 1, "accumulation_steps": 1, "ema_decay": None},
}


def small_config(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    return write_config(folder, name=name, **merged(SMALL, sections))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose checkpoints are written, in order."""
    steps: list[int] = []
    write = CheckpointWriter.write

    def noted(self: CheckpointWriter, step: int, parts: dict[str, Any]) -> None:
        steps.append(step)
        write(self, step, parts)

    monkeypatch.setattr(CheckpointWriter, "write", noted)
    return steps


def test_a_step_is_saved_once(tmp_path: Path, written: list[int]) -> None:
    """Steps 2, 4 and 6 end epochs that are evaluated, and are due by their number as well."""
    config = short(tmp_path, "run", run={"checkpoint_every_steps": 1, "evaluate_every_epochs": 1})
    folder = train_here(config)
    assert written == [1, 2, 3, 4, 5, 6]
    (folder / "result.json").unlink(missing_ok=True)
    train_here(config, resume=True)
    assert written == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", [3, 4], ids=["inside of an epoch", "at its end"])
def test_a_signal_at_a_saved_step_saves_nothing(tmp_path: Path, written: list[int], step: int) -> None:
    config = short(tmp_path, "run", run={"checkpoint_every_steps": 1, "evaluate_every_epochs": 1})

    class Signalled(StopSignal):
        def agreed(self) -> int:
            return signal.SIGTERM if trainer.step == step else 0

    with (
        Signalled(ALONE) as stop,
        pytest.raises(Interrupted, match=rf"stopped at step {step}; saved .*{step}; continue"),
    ):
        trainer = Trainer(build_experiment(config, ALONE), Path(config.run.dir), stop, label="student", resume=False)
        trainer.run()
    assert written == list(range(1, step + 1))
    with StopSignal(ALONE) as stop:
        Trainer(build_experiment(config, ALONE), Path(config.run.dir), stop, label="student", resume=True).run()
    assert written == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_a_run_stopped_by_a_full_disk_resumes(tmp_path: Path) -> None:
    """The disk holds one checkpoint of 0.7 MB, and not a second one beside it."""
    disk = tmp_path / "disk"
    with small_disk(disk, kib=1200) as resize:
        config = small_config(disk, "run", run={"checkpoint_every_steps": 1})
        done = run(config)
        assert done.returncode == 6, done.stderr
        assert "unikd train: error: cannot write the checkpoint" in done.stderr
        assert "those before it are as they were; free at least 0." in done.stderr
        assert newest_checkpoint(disk / "run")["run"]["step"] == 1
        resize(9 << 10)
        done = run(config, "--resume", "auto")
        assert done.returncode == 0, done.stderr
        resumed = load_file(disk / "run" / "student.safetensors")
        records = train_records(disk / "run")
    done = run(small_config(tmp_path, "whole", run={"checkpoint_every_steps": 1}))
    assert done.returncode == 0, done.stderr
    whole = load_file(tmp_path / "whole" / "student.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in whole.items())
    assert records == train_records(tmp_path / "whole")


@pytest.mark.long
def test_damaged_checkpoints_are_skipped_on_resume(tmp_path: Path) -> None:
    config = small_config(tmp_path, "run", run={"checkpoint_every_steps": 2, "keep_checkpoints": 3})
    assert run(config).returncode == 0
    folder = tmp_path / "run"
    records = train_records(folder)
    final = load_file(folder / "student.safetensors")
    (folder / "result.json").unlink()
    damaged = folder / "checkpoints" / checkpoint_name(6) / "student.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    done = run(config, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert f"passed over a checkpoint: {damaged} is damaged: its checksum is" in done.stderr
    assert f"continuing from {folder / 'checkpoints' / checkpoint_name(4)}" in done.stderr
    assert train_records(folder) == records
    assert all(tensor.equal(final[name]) for name, tensor in load_file(folder / "student.safetensors").items())

    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").glob("step-*/checkpoint.json"):
        os.truncate(path, 100)
    done = run(config, "--resume", "auto")
    assert done.returncode == 6
    assert f"no checkpoint in {folder / 'checkpoints'} is whole: " in done.stderr


def hungry(config: Path) -> int:
    """Train in a process that may not grow from the third step on, whose images are many."""
    count = 0

    def step(engine: Any, teacher: Any, method: Any, batch: Batch, target: Any = None, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            size = psutil.Process().memory_info().vms + 2**26
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            batch = batch._replace(images=batch.images.repeat(40, 1, 1, 1), labels=batch.labels.repeat(40))
        return train_step(engine, teacher, method, batch, target, **options)

    step_module.train_step = step
    return main(["train", "--config", str(config)])


@pytest.mark.parametrize(("method", "part"), [("unikd", "teacher"), ("none", "student")])
def test_out_of_memory_names_the_part_and_the_remedy(tmp_path: Path, method: str, part: str) -> None:
    done = Ranks(partial(hungry, small_config(tmp_path, "run", distill={"method": method})), tmp_path).done()
    assert done.returncode == 7, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"out of memory in the {part}'s part: " in last
    assert "raise train.accumulation_steps" in last
    assert newest_checkpoint(tmp_path / "run")["run"]["step"] == 2


@pytest.mark.long
def test_any_full_disk_is_a_one_line_error(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    config = write_config(
        tmp_path,
        name="run",
        run={"trackers": ["tensorboard"], "checkpoint_every_steps": None, "dir": str(disk / "run")},
        data={"image_size": 16, "synthetic_samples": 32},
        student={"model": "cifar/resnet8"},
        distill={"method": "kd"},
        train={"total_epochs": 2, "max_steps": 4, "accumulation_steps": 1, "ema_decay": None},
    )
    failed = []
    with small_disk(disk, kib=4) as resize:
        for kib in (*range(4, 32, 4), *range(650, 3000, 75)):
            resize(kib)
            done = run(config)
            resize(65536)
            assert run(config, "--resume", "auto").returncode == 0, kib
            shutil.rmtree(disk / "run")
            if done.returncode == 0:
                break
            said = [line for line in done.stderr.splitlines() if "error:" in line or "Traceback" in line]
            assert done.returncode in (1, 6) and len(said) == 1 and str(disk / "run") in said[0], (kib, done)
            failed += said
    assert done.returncode == 0, done
    assert len(failed) > 10
    named = " ".join(failed)
    for name in ("environment.json", "config.json", "teacher.json", "metrics.jsonl", "checkpoints/"):
        assert f"run/{name}" in named, named
