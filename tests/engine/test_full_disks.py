"""Runs on disks of all sizes that are too small: one line each, and with more room the same folder goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.real_runs import ROOT, write_config

pytestmark = [pytest.mark.slow, pytest.mark.long]

# In a mount name space of its own; grows the disk after each failure and resumes what failed.
ON_SMALL_DISKS = """
import contextlib, io, logging, shutil, subprocess, sys
from pathlib import Path
from support.real_runs import process_group
from unikd_fast.cli import main
from unikd_fast.engine.distributed import Processes
disk, config = map(Path, sys.argv[1:])
if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
    print("no mount"); sys.exit()
Processes.leave = lambda _: None  # the group is for all of these runs

def train(kib, *arguments):
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
    logging.getLogger("unikd_fast").handlers = []
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main(["train", "--config", str(config), *arguments])
    return code, [line for line in said.getvalue().splitlines() if "error:" in line or "Traceback" in line]

with process_group(config.parent):
    for kib in (*range(4, 32, 4), *range(650, 3000, 75)):
        code, said = train(kib)
        print(kib, code, train(65536, "--resume", "auto")[0], *said, sep="|", flush=True)
        shutil.rmtree(disk / "run")
        if code == 0:
            break
"""


def test_a_disk_of_any_size_ends_with_one_line(tmp_path: Path) -> None:
    before = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("mount name spaces are not allowed here")
    disk = tmp_path / "disk"
    disk.mkdir()
    config = write_config(
        tmp_path,
        name="run",
        run={"tensorboard": True, "checkpoint_every_steps": None, "dir": str(disk / "run")},
        data={"image_size": 16, "synthetic_samples": 32},
        student={"model": "cifar/resnet8"},
        distill={"method": "kd"},
        train={"total_epochs": 2, "max_steps": 4, "accumulation_steps": 1, "ema_decay": None},
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "engine")])
    done = subprocess.run(
        [*before, sys.executable, "-c", ON_SMALL_DISKS, str(disk), str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=1800,
    )
    lines = [line.split("|") for line in done.stdout.splitlines() if line.count("|") > 1]
    if not lines and "no mount" in done.stdout:
        pytest.skip("mounting a tmpfs is not allowed here")
    *failed, last = lines
    assert last[1:] == ["0", "0"], done.stdout + done.stderr
    assert len(failed) > 10
    for _, code, resumed, *said in failed:
        assert (code in ("1", "6"), resumed, len(said)) == (True, "0", 1), done.stdout
        assert str(disk / "run") in said[0], done.stdout
    named = " ".join(line[3] for line in failed)
    for name in ("environment.json", "config.json", "teacher.json", "tensorboard", "metrics.jsonl", "checkpoints/"):
        assert f"run/{name}" in named, done.stdout
