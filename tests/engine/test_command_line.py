"""The command as users type it: launchers, refusals, messages, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.long_rounds import long
from support.real_runs import ROOT, launch, run, run_ranks, write_config
from unikd_fast.models import build_model

pytestmark = pytest.mark.slow

SHORT = {"total_epochs": 1, "max_steps": 2, "accumulation_steps": 1}


@pytest.mark.parametrize(("launcher", "processes"), [long("python", 1), long("torchrun", 2), long("deepspeed", 1)])
def test_every_launcher_leaves_a_complete_folder(tmp_path: Path, launcher: str, processes: int) -> None:
    config = write_config(
        tmp_path, name="short", train=SHORT, run={"trackers": ["tensorboard"]}, distill={"teacher_head": "prefit"}
    )
    done = launch(config, launcher=launcher, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count(f"launched {processes} process{'es' * (processes > 1)} on 1 node: ") == 1
    assert ("(processes 0-1); CPU; gloo" in done.stderr) == (processes == 2)
    folder = tmp_path / "short"
    assert f"run folder: {folder}" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in table] == ["", "-" * len(table[1].split("|")[1]), "teacher", "student"]
    report = (folder / "report.md").read_text()
    assert all(line in report for line in table)

    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == processes
    assert environment["versions"]["deepspeed"]
    assert json.loads((folder / "config.json").read_text())["train"]["max_steps"] == 2
    kinds = [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["train", "train", "evaluation"]
    assert list((folder / "tensorboard").iterdir())

    plain = build_model("torchvision/mobilenet_v3_small", num_classes=10)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain.load_state_dict(load_file(folder / "student.safetensors"), strict=True)
    assert any((before[name] != tensor).any() for name, tensor in plain.state_dict().items())


def test_the_module_is_the_command() -> None:
    line = [sys.executable, "-m", "unikd_fast", "train", "--config", "/no/such.json"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("unikd train: error: ")) == (2, 1)


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    config = write_config(tmp_path, name="once", train=SHORT)
    first = run(config)
    assert first.returncode == 0, first.stderr
    weights = (tmp_path / "once" / "student.safetensors").read_bytes()
    again = run(config)
    assert again.returncode == 2
    assert "--resume auto" in again.stderr
    other = run(config, "--resume", "auto", "--set", "distill.unikd.alpha=1.5")
    assert other.returncode == 2
    assert "distill.unikd.alpha was 4.0, now 1.5" in other.stderr
    shown = run(config, "--resume", "auto")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]
    assert (tmp_path / "once" / "student.safetensors").read_bytes() == weights


def test_a_non_finite_loss_ends_the_run(tmp_path: Path) -> None:
    train = {"total_epochs": 3, "learning_rate": 1e30, "accumulation_steps": 1, "clip_grad_norm": 0.0}
    config = write_config(
        tmp_path, name="diverged", train=train, run={"checkpoint_every_steps": 1, "log_every_steps": 2}
    )
    done = run(config)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "loss is not finite at step" in done.stderr
    assert "ce " in done.stderr
    assert str(tmp_path / "diverged" / "checkpoints" / "step-00000000") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, name="plan")
    done = run(config, "--dry-run")
    assert done.returncode == 0, done.stderr
    for part in (
        "1,528,106 parameters",
        "96 training samples",
        "6 per epoch, 18 in all",
        "MiB per process",
        "16 = 1 process x 8 x 2",
    ):
        assert part in done.stdout, done.stdout
    assert not (tmp_path / "plan").exists()


def test_a_batch_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, name="odd", train={"global_batch_size": 9, "accumulation_steps": 1})
    done = run_ranks(config)
    assert done.returncode == 2
    message = "a global batch of 9 does not divide into world_size 2 x accumulation_steps 1"
    assert done.stderr.count(message) == 1  # one process speaks for all
    assert "set it to 8 or 10" in done.stderr
    assert not (tmp_path / "odd").exists()
