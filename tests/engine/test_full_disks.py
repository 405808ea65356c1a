"""Runs on disks of all sizes that are too small: one line each, and with more room the same folder goes on."""

import shutil
from pathlib import Path

import pytest

from support.real_runs import run, write_config
from support.small_disks import small_disk

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_any_full_disk_is_a_one_line_error(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    config = write_config(
        tmp_path,
        name="run",
        run={"tensorboard": True, "checkpoint_every_steps": None, "dir": str(disk / "run")},
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
    for name in ("environment.json", "config.json", "teacher.json", "tensorboard", "metrics.jsonl", "checkpoints/"):
        assert f"run/{name}" in named, named
