"""Runs that come to a cache that is there: the next one, and one that was killed."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.cached_runs import STEPS, same_weights, state_of
from support.real_runs import (
    cached_config,
    newest_checkpoint,
    run,
    start,
    train_here,
    train_records,
    wait_for_step,
)
from unikd_fast.config import load_config


def test_a_second_run_builds_nothing(tmp_path: Path, weights: Path) -> None:
    configs = [
        cached_config(tmp_path, weights, name="first", cache={"recheck": 0.001}),
        cached_config(tmp_path, weights, name="second", cache={"recheck": 0.001}),
        cached_config(tmp_path, weights, name="unchecked"),
        cached_config(tmp_path, weights, name="reading", cache={"mode": "read"}),
    ]
    folders, files = [], []
    for config in configs:
        folders.append(train_here(load_config(config)))
        files.append(state_of(tmp_path / "outputs"))
    records = [json.loads((folder / "teacher.json").read_text()) for folder in folders]
    assert [record["built_shards"] for record in records] == [1, 0, 0, 0]
    assert all(found == files[0] for found in files)
    assert all(same_weights(folders[0], folder) for folder in folders[1:])
    assert all(train_records(folder) == train_records(folders[0]) for folder in folders[1:])
    assert ["recheck" in record for record in records] == [True, True, False, False]
    assert all(record["recheck"]["views"] == 64 for record in records[:2])  # a batch at least
    assert all(record["recheck"]["worst"] <= 2.0**-11 for record in records[:2])  # another batch rounds otherwise


@pytest.mark.slow
def test_a_killed_cached_run_continues_bit_for_bit(tmp_path: Path, weights: Path) -> None:
    """The second run finds the first one's cache, and the third plans and checks before it goes on."""
    sections: dict[str, Any] = {
        "run": {"checkpoint_every_steps": 1},
        "train": {"ema_decay": 0.9},
        "cache": {"recheck": 0.001},
    }
    whole = cached_config(tmp_path, weights, name="whole", **sections)
    done = run(whole)
    assert done.returncode == 0, done.stdout + done.stderr
    built = state_of(tmp_path / "outputs")

    cut = cached_config(tmp_path, weights, name="cut", **sections)
    process = start(cut)
    wait_for_step(tmp_path / "cut", 8, process)  # six steps an epoch: inside the second one
    process.kill()
    saved = newest_checkpoint(tmp_path / "cut")
    assert 6 <= saved["run"]["step"] < STEPS
    done = run(cut, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert train_records(tmp_path / "whole") == train_records(tmp_path / "cut")
    assert state_of(tmp_path / "outputs") == built
