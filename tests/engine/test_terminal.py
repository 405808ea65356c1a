"""What a run says on the terminal: once, what matters, and readable at 80 columns."""

import fcntl
import json
import logging
import math
import os
import re
import select
import struct
import sys
import termios
from pathlib import Path

import pytest
import torch
from torch import nn

from support.real_runs import ALONE, launch, write_config
from unikd_fast.config import load_config
from unikd_fast.engine.describe import describe
from unikd_fast.engine.distributed import explain_bad_evaluation
from unikd_fast.engine.evaluate import evaluate
from unikd_fast.engine.metrics import MetricsWriter
from unikd_fast.engine.run import _Once
from unikd_fast.models import build_model
from unikd_fast.values import Batch, Features

HEAD = {"accuracy": 50.0, "ce": 1.5, "head_accuracy": 0.5, "head_mean_std": 0.2}


def written(folder: Path, monkeypatch: pytest.MonkeyPatch, *, hidden: str | None = None) -> str:
    """What a run shows on a terminal of 80 columns."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(its, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        label = "student + UniKD with a long name, seed 12345"
        writer = MetricsWriter(folder, ALONE, label=label, total_steps=300_000, start_step=0, hidden=hidden)
        for step in (100_000, 200_000):
            writer.advance(step)
            writer.write("train", step, {"epoch": 1.0, "total": 2.3456, "ce": 1.0, "images_per_s": 123.4, "lr": 0.1})
        for _ in range(2):
            writer.write("evaluation", 200_000, HEAD)
            writer.explain("the reason")
        writer.close()
        terminal.flush()
        said = b""
        while select.select([ours], [], [], 0.3)[0]:  # the kernel hands it over in parts
            said += os.read(ours, 4096)
    os.close(ours)
    return said.decode()


def test_the_progress_bar_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = [part for part in re.split(r"[\r\n]", written(tmp_path, monkeypatch)) if "%" in part]
    assert all(len(bar) < 80 for bar in bars)
    assert re.fullmatch(
        r"student \+ UniKD with\.\.\. +67% .{8,12} 200000/300000, loss 2\.35, \d\d:\d\d:\d\d left", bars[-1].strip()
    )


def test_an_explanation_is_printed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = written(tmp_path, monkeypatch)
    assert said.count("accuracy 50") == 2
    assert said.count("the reason") == 1


@pytest.mark.parametrize(("hidden", "shown"), [(None, True), ("head_", False)])
def test_figures_of_the_head_can_be_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str | None, shown: bool
) -> None:
    said = written(tmp_path, monkeypatch, hidden=hidden)
    assert ("head_accuracy 0.5" in said) == shown
    assert "accuracy 50" in said
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["head_accuracy"] == 0.5


@pytest.mark.parametrize(("classes", "keys"), [(5, {"accuracy"}), (6, {"accuracy", "top5"})])
def test_top_5_needs_more_than_five_classes(classes: int, keys: set[str]) -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> Features:
            return Features((), torch.arange(classes).float().expand(len(images), -1))

    ids = torch.arange(classes)
    found = evaluate(Constant(), [Batch(torch.zeros(classes, 3, 1, 1), ids, ids)], ALONE)
    assert found.keys() == keys | {"ce", "samples"}
    assert found["accuracy"] == 100 / classes
    assert found.get("top5", 500 / 6) == pytest.approx(500 / 6)


def test_fresh_running_averages_are_explained() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for _ in range(7):
        network(1000 * torch.randn(2, 3, 4, 4))
    said = explain_bad_evaluation(2.9e5, network, 10)
    assert said is not None
    assert said.startswith("this cross-entropy means little before batch 44: ")  # 0.9**44 < 0.01 < 0.9**43
    network(torch.randn(2, 3, 4, 4))
    assert explain_bad_evaluation(2.9e5, network, 10) == said
    assert explain_bad_evaluation(math.log(10), network, 10) is None  # as good as a guess
    for _ in range(40):
        network(torch.randn(2, 3, 4, 4))
    assert explain_bad_evaluation(2.9e5, network, 10) is None  # something else
    assert explain_bad_evaluation(2.9e5, nn.Conv2d(3, 4, 1), 10) is None


def test_a_message_is_logged_once() -> None:
    once = _Once()
    records = [logging.LogRecord("unikd_fast", 20, "", 0, "%s runs", (name,), None) for name in "aba"]
    assert [once.filter(record) for record in records] == [True, True, False]


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_a_teacher_trained_first_is_not_called_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fine_tuned: bool
) -> None:
    weights = str(tmp_path / "teacher.pth") if fine_tuned else None
    if weights is not None:
        torch.save(build_model("cifar/resnet8", num_classes=7).state_dict(), weights)
    teacher = {"weights": weights, "training": {"total_epochs": 1}}
    config = load_config(write_config(tmp_path, teacher=teacher, train={"total_epochs": 1}))
    with caplog.at_level(logging.INFO, logger="unikd_fast"):
        said = describe(config, ALONE)
    assert f"weights {weights or 'trained first'}" in said
    assert "fidelity not checked: the run trains the teacher first" in said
    assert "random" not in said + caplog.text


@pytest.mark.slow
def test_a_run_logs_its_setup_once_and_no_noise(tmp_path: Path) -> None:
    runs = {"KD": {"distill.method": "kd"}, "UniKD": {"distill.unikd.head_steps": 4}}
    config = write_config(
        tmp_path,
        run={"log_every_steps": 9},
        distill={"teacher_head": "prefit"},
        train={"total_epochs": 1},
        compare={"seeds": [0], "runs": runs},
    )
    done = launch(config)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"launched 1 process on 1 node: \S+ \(processes 0\); CPU", done.stderr.splitlines()[0])
    assert not [line for line in (done.stderr + done.stdout).splitlines() if "WARNING" in line or "INFO" in line]
    for once in (
        "  data      synthetic: 96 training samples, 10 classes, 32 x 32",
        "  student   torchvision/mobilenet_v3_small: 1,528,106 parameters",
        "  teacher   cifar/resnet8: 77,706 parameters, weights random",
        "  method    kd",
        "  batch     16 = 1 process x 8 x 2 accumulation steps, ZeRO stage 0, fp32",
        "  steps     6 per epoch, 6 in all",
        "[KD, seed 0] trains torchvision/mobilenet_v3_small",
        "the teacher's fidelity is not checked: teacher.weights=random, whose classes mean nothing",
    ):
        assert done.stderr.splitlines().count(once) == 1, (once, done.stderr)
    for noise in ("AdaptiveFeatureFusion", "train.cuda_graph", "head_accuracy"):
        assert noise not in done.stderr
