"""A killed run continues bit for bit: one and two processes, every ZeRO stage, mid-epoch.

Two processes killed at random moments are in `test_faults` as well, which is why those here are long.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.real_runs import newest_checkpoint, run_ranks, start, train_records, wait_for_step, write_config

pytestmark = pytest.mark.slow

CASES: list[Any] = [
    pytest.param(1, 0, 2, id="one process, stage 0"),
    pytest.param(2, 0, 3, marks=pytest.mark.long, id="two processes, stage 0"),
    pytest.param(2, 1, 3, marks=pytest.mark.long, id="two processes, stage 1"),
    pytest.param(2, 2, 3, marks=pytest.mark.long, id="two processes, stage 2"),
    # A step takes a second or two here: no third epoch.
    pytest.param(2, 3, 2, marks=pytest.mark.long, id="two processes, stage 3"),
]


def assert_same_weights(left: Path, right: Path) -> None:
    a, b = load_file(left), load_file(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs"


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
    assert_same_weights(tmp_path / "whole" / "student.safetensors", tmp_path / "cut" / "student.safetensors")
    assert train_records(tmp_path / "whole") == train_records(tmp_path / "cut")
