"""DeepSpeed's launcher over a hostfile and ssh: a run on two nodes, and one whose cable is cut."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.real_runs import ROOT, newest_checkpoint, run_ranks, train_records, wait_for_step, write_config
from support.two_nodes import ADDRESSES, Nodes, missing, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

SETTINGS: dict[str, Any] = {
    "student": {"model": "cifar/resnet8"},
    "run": {"nodes": 2},
    "train": {"total_epochs": 2, "learning_rate": 0.0005},
}
ENVIRONMENT = {
    name: os.environ[name] for name in ("PATH", "PYTHONPATH", "GOMP_SPINCOUNT", "OMP_NUM_THREADS") if name in os.environ
}


def launch(nodes: Nodes, config: Path, *arguments: str) -> "subprocess.Popen[str]":
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    options = ["--hostfile", str(nodes.hostfile), "--master_addr", ADDRESSES[0], "--no_ssh_check"]
    command = [sys.executable, deepspeed, *options, str(ROOT / "launch_distill.py"), "--config", str(config)]
    return subprocess.Popen(
        nodes.on_first(*command, *arguments),
        cwd=ROOT,
        env=nodes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_nodes_train_like_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "ssh").mkdir()
    config = write_config(tmp_path, name="nodes", **SETTINGS)
    with two_nodes(tmp_path / "ssh", ENVIRONMENT) as nodes:
        process = launch(nodes, config)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "launched 2 processes on 2 nodes" in output
    one = write_config(tmp_path, name="one", **{**SETTINGS, "run": {"nodes": 1}})
    done = run_ranks(one)
    assert done.returncode == 0, done.stdout + done.stderr
    # On nodes of their own both have all cores, and sum in another order.
    nodes_losses, one_losses = (
        [record["total"] for record in train_records(tmp_path / name) if record["kind"] == "train"]
        for name in ("nodes", "one")
    )
    assert len(nodes_losses) == 12
    assert nodes_losses == pytest.approx(one_losses, rel=2e-5)


def test_a_cut_cable_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "ssh").mkdir()
    run_section = {"nodes": 2, "timeout_minutes": 0.25, "checkpoint_every_steps": 1}
    config = write_config(
        tmp_path, name="cut", **{**SETTINGS, "run": run_section, "train": {"total_epochs": 200, "max_steps": 1000}}
    )
    with two_nodes(tmp_path / "ssh", ENVIRONMENT) as nodes:
        process = launch(nodes, config)
        try:
            wait_for_step(tmp_path / "cut", 3, process)
            nodes.cut()
            began = time.monotonic()
            output, _ = process.communicate(timeout=180)
            assert time.monotonic() - began < 60
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "another process of this run ended, or did not answer within 0.25 minutes" in output
    assert newest_checkpoint(tmp_path / "cut")["run"]["step"] >= 2
