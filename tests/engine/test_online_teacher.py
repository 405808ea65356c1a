"""The teacher inside the engine: checked before training, recorded in the run folder, one decision for all."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from support.real_runs import run, run_ranks, write_config
from unikd_fast.config import ConfigError, load_config
from unikd_fast.engine import checked_teacher
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.describe import log_run
from unikd_fast.engine.distributed import Processes
from unikd_fast.models import build_model
from unikd_fast.teacher import fidelity
from unikd_fast.teacher import online as formats

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
TEACHER = {"model": "cifar/resnet8"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher's weights, and the same function with activations beyond fp16's range: 1e6 after the stem."""
    torch.manual_seed(0)
    model = build_model("cifar/resnet8", num_classes=10)
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for name, scale in (("ordinary", 1.0), ("loud", 1e6)):
        model.bn1.weight.data.fill_(scale)  # type: ignore[union-attr]
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        with torch.no_grad():
            model.train()(torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
        found[name] = folder / f"{name}.pth"
        torch.save(model.state_dict(), found[name])
    return found


def experiment(tmp_path: Path, **teacher: Any) -> Experiment:
    fidelity = {"min_agreement": 0.0} | teacher.pop("fidelity", {})  # random weights have no margins
    config = write_config(tmp_path, teacher={**TEACHER, **teacher, "fidelity": fidelity})
    return build_experiment(load_config(config), ALONE)


def test_the_teacher_is_compared_with_itself_in_fp32(tmp_path: Path, weights: dict[str, Path]) -> None:
    built = experiment(tmp_path, weights=str(weights["ordinary"]), precision="bf16", fidelity={"batches": 3})
    record = built.teacher_record
    assert built.teacher is not None
    assert record is not None
    assert (record["precision"], record["folded_batch_norms"], record["compile"]) == ("bf16", 9, None)
    assert record["fidelity"]["images"] == 3 * 8
    assert 1e-4 < record["fidelity"]["relative_logit_error"] < 0.1
    assert len(record["fidelity"]["feature_errors"]) == 3


def test_an_unfaithful_teacher_is_refused_before_training(tmp_path: Path, weights: dict[str, Path]) -> None:
    loud = {"weights": str(weights["loud"]), "precision": "fp16"}
    with pytest.raises(
        ConfigError, match=r"in fp16, .* not finite on 32 training images.*--set teacher.precision=bf16"
    ):
        experiment(tmp_path, **loud)
    assert experiment(tmp_path, **loud, fidelity={"batches": 0}).teacher_record["fidelity"] is None  # type: ignore[index]


def test_auto_avoids_fp16_where_it_overflows(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (checked_teacher, formats):  # as on a GPU
        monkeypatch.setattr(module, "resolve_precision", lambda precision, device: "fp16")
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        built = experiment(tmp_path, weights=str(weights["loud"]), precision="auto")
    assert "runs in bf16 instead" in caplog.text
    assert built.teacher_record["precision"] == "bf16"  # type: ignore[index]
    assert built.teacher.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert experiment(tmp_path, weights=str(weights["ordinary"])).teacher_record["precision"] == "fp16"  # type: ignore[index]


def test_auto_avoids_a_precision_that_is_not_faithful(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (checked_teacher, formats):  # as on a CPU with bf16 units
        monkeypatch.setattr(module, "resolve_precision", lambda precision, device: precision.replace("auto", "bf16"))
    exact = experiment(tmp_path, weights=str(weights["ordinary"]), precision="fp32").teacher
    monkeypatch.setattr(fidelity, "LOGIT_BOUND", 0.3)  # 1.2e-3 of the logits in bf16, 9e-6 in fp32
    given = {"weights": str(weights["ordinary"])}
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        built = experiment(tmp_path, **given, precision="auto")
    assert "precision = auto: the teacher runs in fp32 instead; teacher in bf16, " in caplog.text
    assert "the logits differ by" in caplog.text and "--set" not in caplog.text
    assert built.teacher_record is not None and built.teacher is not None and exact is not None
    assert built.teacher_record["precision"] == "fp32"
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(built.teacher(images).logits, exact(images).logits)
    with pytest.raises(ConfigError, match=r"in bf16, .*--set teacher.precision=fp32"):
        experiment(tmp_path, **given, precision="bf16")


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ({"weights": "random"}, "classes mean nothing"),
        ({"weights": "ordinary", "precision": "fp32", "fold_batch_norm": False}, "as it was given"),
    ],
)
def test_a_skipped_check_is_explained(
    tmp_path: Path,
    weights: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    teacher: dict[str, Any],
    reason: str,
) -> None:
    given = {**teacher, "weights": str(weights.get(teacher["weights"], "random"))}
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        built = experiment(tmp_path, **given)
        record = built.teacher_record
        log_run(built, "student")
    assert record is not None
    assert record["fidelity"] is None
    assert reason in record["fidelity_skipped"]
    assert ("not checked" in caplog.text) == (given["weights"] == "random")


@pytest.mark.long
def test_two_ranks_record_pooled_fidelity(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        name="half",
        run={"checkpoint_every_steps": None, "log_every_steps": 20},
        data={"name": "digits", "image_size": 16, "train_samples": 64},
        teacher={
            **TEACHER,
            "weights": None,
            "training": {"total_epochs": 3, "global_batch_size": 64},
            "precision": "bf16",
        },
        train={"total_epochs": 1, "accumulation_steps": 1},
    )
    done = run_ranks(config)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "half" / "teacher.json").read_text())
    assert (record["precision"], record["folded_batch_norms"], record["fidelity_skipped"]) == ("bf16", 9, None)
    assert record["fidelity"]["images"] == 2 * 4 * 8  # processes, batches, images of a micro-batch
    assert record["fidelity"]["top1_agreement"] >= 0.995
    assert not (tmp_path / "half" / "teacher" / "teacher.json").exists()  # whose training had none

    trained = tmp_path / "half" / "teacher" / "student.safetensors"
    plan = run(config, "--dry-run", "--set", f"teacher.weights={trained}", "--set", "teacher.training=null")
    assert plan.returncode == 0, plan.stderr
    assert "runs in bf16, 9 BatchNorms folded, compile off" in plan.stdout
    assert "against fp32 on 64 images: logits " in plan.stdout


@pytest.mark.slow
@pytest.mark.long  # `test_online_compile` has the compiled teacher itself
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_run_with_a_compiled_teacher(tmp_path: Path) -> None:
    config = write_config(tmp_path, name="compiled", teacher={"compile": "default"}, train={"max_steps": 2})
    done = run(config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "compiled" / "teacher.json").read_text())["compile"] == "default"
    assert "the teacher's fidelity is not checked: teacher.weights=random" in done.stderr


@pytest.mark.long
def test_weights_of_other_classes_are_fine_tuned_first(tmp_path: Path) -> None:
    pretrained = tmp_path / "seven.pth"
    trained = build_model("cifar/resnet8", num_classes=7)
    torch.save(trained.state_dict(), pretrained)
    teacher = {"weights": str(pretrained), "training": {"total_epochs": 1, "learning_rate": 1e-6}, "min_accuracy": 0.0}
    student = {"model": "cifar/resnet8", "weights": str(pretrained)}
    config = write_config(tmp_path, name="tuned", teacher=teacher, student=student, train={"max_steps": 2})

    refused = run(config, "--set", "teacher.training=null", "--set", f"run.dir={tmp_path / 'refused'}")
    assert refused.returncode == ConfigError.exit_code
    assert "has 7 classes and the teacher 10" in refused.stderr
    assert "set teacher.training to fine-tune it with a new classifier" in refused.stderr

    plan = run(config, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert f"teacher: a new classifier for 10 classes, the weights {pretrained} are for 7" in plan.stderr

    done = run(config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"student: a new classifier for 10 classes, the weights {pretrained} are for 7" in done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if "resnet8" in line]
    assert rows == ["teacher", "student"]
    tuned = load_file(tmp_path / "tuned" / "teacher" / "student.safetensors")
    kept = trained.conv1.weight.detach()  # type: ignore[union-attr, operator]
    assert 0 < (tuned["conv1.weight"] - kept).abs().max() < 1e-3
    assert json.loads((tmp_path / "tuned" / "teacher.json").read_text())["weights"].endswith(
        "teacher/student.safetensors"
    )
