"""A detector as teacher: its precision, the norms that are folded, and what is recorded and refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from support.real_runs import ALONE
from unikd_fast.config import ConfigError, load_config
from unikd_fast.engine import checked_teacher, detector_teacher
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.describe import describe
from unikd_fast.engine.detector_teacher import DetectorTeacher
from unikd_fast.models.detector import Detector, sizes_of
from unikd_fast.models.faster_rcnn import build_detector
from unikd_fast.teacher import online as formats

ARGUMENTS: dict[str, Any] = {
    "frozen_stages": 0,
    "out_channels": 8,
    "representation_size": 16,
    "anchor_sizes": [12, 20, 32, 48, 64],
    "box_batch_size_per_image": 32,
    "rpn_post_nms_top_n_test": 50,
}
NETWORK: dict[str, Any] = {"model": "frcnn/timm/test_resnet", "model_args": ARGUMENTS}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of a detector with frozen norms, and of one whose maps are beyond fp16's range."""
    torch.manual_seed(0)
    network = build_detector(NETWORK["model"], num_classes=4, model_args=ARGUMENTS)
    for tensor in network.backbone.body.buffers():
        tensor.uniform_(0.5, 1.5)
    found, folder = {}, tmp_path_factory.mktemp("weights")
    for name, scale in (("ordinary", 1.0), ("loud", 1e7)):
        for block in network.backbone.fpn.layer_blocks:
            block[0].weight.data.mul_(scale)
        found[name] = str(folder / f"{name}.pth")
        torch.save(network.state_dict(), found[name])
    return found


def config_of(tmp_path: Path, weights: str, **teacher: Any) -> Path:
    fidelity = {"min_agreement": 0.0, "batches": 2} | teacher.pop("fidelity", {})  # random weights have no margins
    raw = {
        "data": {"name": "toy_scenes", "synthetic_samples": 8},
        "teacher": NETWORK | {"weights": weights, "min_accuracy": 0, "fidelity": fidelity} | teacher,
        "student": NETWORK,
        "distill": {"method": "unikd"},
        "train": {"total_epochs": 1, "global_batch_size": 4, "learning_rate": 0.02},
        "run": {"dir": str(tmp_path / "run"), "trackers": []},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path / "config.json"


def experiment(tmp_path: Path, weights: str, **teacher: Any) -> Experiment:
    return build_experiment(load_config(config_of(tmp_path, weights, **teacher)), ALONE)


@torch.no_grad()
def test_a_teacher_in_bf16_is_compared_with_itself(tmp_path: Path, weights: dict[str, str]) -> None:
    built = experiment(tmp_path, weights["ordinary"], precision="bf16")
    teacher, record = built.teacher, built.teacher_record
    assert isinstance(teacher, DetectorTeacher)
    assert record is not None
    assert (record["precision"], record["folded_batch_norms"], record["compared"]) == ("bf16", 15, "regions")
    assert record["fidelity"]["images"] > 8
    assert 1e-4 < record["fidelity"]["relative_logit_error"] < 0.05  # a rounding of bf16 is 0.004
    assert all(1e-4 < error < 0.05 for error in record["fidelity"]["feature_errors"])
    assert len(record["fidelity"]["feature_errors"]) == 4
    # What a step sees, whatever the student's precision.
    batch = next(iter(built.loader.train(0)))
    plain = Detector(build_detector(NETWORK["model"], num_classes=4, model_args=ARGUMENTS), levels="regions").eval()
    plain.plain.load_state_dict(torch.load(weights["ordinary"]))
    with torch.autocast("cpu", torch.float16):
        maps = teacher.maps(batch.images)
        regions = teacher.regions(maps, batch)
        features = teacher.at(maps, regions, sizes_of(batch))
    exact = plain.at(plain.maps(batch.images), regions, sizes_of(batch))
    assert maps["0"].dtype == torch.bfloat16
    assert (features.logits - exact.logits).norm() < 0.05 * exact.logits.norm()
    assert not torch.equal(features.logits, exact.logits)


def test_a_teacher_in_fp32_is_that_of_the_file(tmp_path: Path, weights: dict[str, str]) -> None:
    record = experiment(tmp_path, weights["ordinary"], precision="fp32").teacher_record
    assert record is not None
    assert (record["precision"], record["folded_batch_norms"]) == ("fp32", 15)
    assert 0 < record["fidelity"]["relative_logit_error"] < 1e-5  # folded norms round once more
    plain = experiment(tmp_path, weights["ordinary"], precision="fp32", fold_batch_norm=False).teacher_record
    assert plain is not None
    assert (plain["folded_batch_norms"], plain["fidelity"]) == (0, None)
    assert "as it was given" in plain["fidelity_skipped"]
    said = describe(load_config(config_of(tmp_path, weights["ordinary"], precision="fp32")), ALONE)
    assert "runs in fp32, 15 BatchNorms folded, compile off" in said
    assert " regions: logits " in said


def test_an_unfaithful_teacher_is_refused(tmp_path: Path, weights: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"in fp16, .* not finite on \d+ regions.*--set teacher.precision=bf16"):
        experiment(tmp_path, weights["loud"], precision="fp16")


def test_auto_avoids_fp16_where_it_overflows(
    tmp_path: Path, weights: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (checked_teacher, formats, detector_teacher):  # as on a GPU
        monkeypatch.setattr(module, "resolve_precision", lambda precision, device: "fp16")
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        record = experiment(tmp_path, weights["loud"], precision="auto", fidelity={"batches": 0}).teacher_record
    assert "runs in bf16 instead" in caplog.text
    assert record is not None
    assert record["precision"] == "bf16"
