"""Detectors are trained, distilled, evaluated and resumed by the engine that trains classifiers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

from support.ranks import Done
from support.real_runs import call, run, run_ranks, start, train_records, wait_for_step
from support.scene_files import write_coco
from unikd_fast.data.detection.sets import open_scenes
from unikd_fast.data.settings import DataSettings
from unikd_fast.engine.detection import DETECTIONS
from unikd_fast.models.faster_rcnn import build_detector
from unikd_fast.report.command import _sections
from unikd_fast.report.page import Missing, Picture, Table
from unikd_fast.report.run_files import PICTURE
from unikd_fast.report.runs import find_runs

SAMPLES = 24
NETWORK: dict[str, Any] = {
    "model": "frcnn/timm/test_resnet",
    "model_args": {
        "norm": "batch",
        "frozen_stages": 0,
        "out_channels": 8,
        "representation_size": 16,
        "anchor_sizes": [12, 20, 32, 48, 64],
        "box_batch_size_per_image": 32,
        "rpn_post_nms_top_n_train": 50,
        "rpn_post_nms_top_n_test": 20,
        "box_score_thresh": 0.0,
    },
}
CONFIG: dict[str, Any] = {
    "data": {"name": "toy_scenes", "synthetic_samples": SAMPLES},
    "teacher": NETWORK | {"weights": "random", "min_accuracy": 0},
    "student": NETWORK,
    "distill": {"method": "kd"},
    "train": {"total_epochs": 2, "global_batch_size": 4, "learning_rate": 0.02, "clip_grad_norm": 10.0},
    "run": {"log_every_steps": 1, "checkpoint_every_steps": 1, "trackers": []},
}


def write(folder: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    config["run"]["dir"] = str(folder / name)
    (folder / f"{name}.json").write_text(json.dumps(config))
    return folder / f"{name}.json"


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def succeeded(done: Done) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_from_teacher_to_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = {"weights": None, "training": {"total_epochs": 1}}
    distill = {
        "method": ["unikd", "dkd"],
        "unikd": {"alpha": 0.2, "beta": 0.0},
        "dkd": {"beta": 0.25, "temperature": 1.0},
    }
    config = write(tmp_path, teacher=teacher, distill=distill)
    printed = succeeded(run(config))
    assert "Test AP (%)" in printed
    result = result_of(tmp_path / "run")
    figures = result["last"]["test"]
    assert f" {figures['ap']:.2f} " in printed
    assert set(figures["ap_by_class"]) <= {"disc", "square", "triangle", "cross"}
    # As the reference evaluator reads the file.
    splits = open_scenes(DataSettings(name="toy_scenes", synthetic_samples=SAMPLES))
    truth = COCO()
    truth.dataset = splits.ground_truth("test")
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "run" / DETECTIONS)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert [figures[key] for key in ("ap", "ap50", "ap75")] == pytest.approx(100 * evaluation.stats[:3], abs=1e-9)
    # The exported student is torchvision's.
    student = build_detector(NETWORK["model"], num_classes=4, model_args=NETWORK["model_args"])
    student.load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| test AP | test AP50 | test AP75 |" in report
    check_prediction(tmp_path)
    check_page(tmp_path / "run", result)


def check_page(folder: Path, result: dict[str, Any]) -> None:
    """The page shows figures and pictures of teacher and student, and lacks none."""
    sections = {section.anchor: section for section in _sections(find_runs([folder]))}
    every, by_class = (part for part in sections["results"].parts[-2:] if isinstance(part, Table))
    figures = result["last"]["test"]
    assert every.rows[1][1:4] == tuple(f"{figures[key]:.2f}" for key in ("ap", "ap50", "ap75"))
    assert {row[0]: row[2] for row in by_class.rows} == {k: f"{v:.2f}" for k, v in figures["ap_by_class"].items()}
    pictures = [part.draw for part in sections["detections"].parts if isinstance(part, Picture)]
    assert pictures == [(place / PICTURE).read_bytes() for place in (folder / "teacher", folder)]
    missing = [part.text for section in sections.values() for part in section.parts if isinstance(part, Missing)]
    assert [text[:34] for text in missing if "step" not in text] == ["The paper prints nothing for toy_s"]


def test_one_split_for_validation_and_test(tmp_path: Path) -> None:
    """As in COCO 2017: the AP of classes are those of the evaluations in training."""
    write_coco(tmp_path, open_scenes(DataSettings(name="toy_scenes", synthetic_samples=8)), ("train", "val"))
    sizes = {"short_sides": [64], "long_side": 128}
    data = {"name": "coco", "root": str(tmp_path), "loader": "torchvision", "workers": 0, "detection": sizes}
    done = run(write(tmp_path, data=data, distill={"method": "none"}, train={"max_steps": 1}))
    succeeded(done)
    result, log = result_of(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_text()
    by_class = json.loads(log.splitlines()[-1])["ap_by_class"]
    assert result["test_is_val"]
    assert set(by_class) == {"square", "triangle", "cross"}  # there is no disc among them
    assert [result[which]["test"]["ap_by_class"] for which in ("best", "last")] == [by_class] * 2
    assert " ap50 " in done.stderr
    assert "ap_by_class" not in done.stderr


def check_prediction(folder: Path) -> None:
    """`unikd predict` finds what the evaluation found, and draws it."""
    splits = open_scenes(DataSettings(name="toy_scenes", synthetic_samples=SAMPLES))
    pixels = splits.test.images[0]
    assert isinstance(pixels, torch.Tensor)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / "scene.png")
    options = ["--json", "--checkpoint", "last", "--least-score", "0", "--draw", folder / "drawn"]
    printed = succeeded(call("predict", folder / "run", folder / "scene.png", *options))
    found = json.loads(printed)["objects"]
    evaluated = json.loads((folder / "run" / DETECTIONS).read_text())
    first = [each for each in evaluated if each["image_id"] == int(splits.test.image_ids[0])]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in first], abs=1e-5)
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (each["bbox"] for each in first)]
    assert [tuple(each["box"]) for each in found] == [pytest.approx(box, abs=0.02) for box in boxes]
    drawn = Image.open(folder / "drawn" / "0000-scene.png")
    width, height = Image.open(folder / "scene.png").size
    assert drawn.size == (drawn.width // width * width, drawn.width // width * height)  # enlarged
    assert Image.open(folder / "run" / PICTURE).height > 2 * 240
    said = succeeded(call("export", folder / "run", "--to", folder / "out.safetensors"))
    assert "which load into the plain torchvision FasterRCNN, and how to use it in out.json" in said
    again = call("predict", folder / "out.safetensors", folder / "scene.png", "--json", "--least-score", "0")
    assert json.loads(succeeded(again))["objects"] == found
    said = succeeded(call("export", folder / "run", "--to", folder / "out.onnx"))
    assert "ONNX for images of any size; boxes and scores differ by at most " in said
    again = call("predict", folder / "out.onnx", folder / "scene.png", "--json", "--least-score", "0")
    others = json.loads(succeeded(again))["objects"]
    assert [each["class"] for each in others] == [each["class"] for each in found]
    assert [each["score"] for each in others] == pytest.approx([each["score"] for each in found], abs=2e-6)
    assert [each["box"] for each in others] == [pytest.approx(each["box"], abs=0.02) for each in found]
    text = succeeded(call("predict", folder / "run", folder / "scene.png", "--top", 1, "--least-score", "0"))
    assert re.search(r"scene\.png: (disc|square|triangle|cross) [0-9.]+ % at \d+, \d+, \d+, \d+\n", text)


@pytest.mark.long
def test_a_killed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, cut = write(tmp_path, "whole"), write(tmp_path, "cut")
    succeeded(run(whole))
    process = start(cut)
    wait_for_step(tmp_path / "cut", 7, process)
    process.kill()
    assert not (tmp_path / "cut" / "result.json").exists()
    succeeded(run(cut, "--resume", "auto"))
    ours, theirs = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "cut"))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert result_of(tmp_path / "whole")["last"] == result_of(tmp_path / "cut")["last"]


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """From the same weights, and with one image more than divides evenly."""
    train = {"total_epochs": 1, "max_steps": 1, "learning_rate": 1e-9}
    data = {"synthetic_samples": 11}  # 3 validation images
    one, two = (write(tmp_path, name, train=train, data=data) for name in ("one", "two"))
    succeeded(run(one))
    succeeded(run_ranks(two, processes=2))
    assert result_of(tmp_path / "one")["last"] == result_of(tmp_path / "two")["last"]


FROZEN = {**NETWORK["model_args"], "norm": "frozen", "frozen_stages": 2, "conventions": "detectron2"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("method", "student"),
    [("kd", {}), (["unikd", "dkd"], {}), (["reviewkd", "kd"], {"model_args": FROZEN})],
    ids=["kd", "unikd+dkd", "reviewkd+kd, frozen"],
)
def test_every_stage_trains_the_same_weights(tmp_path: Path, method: Any, student: Any, processes: int) -> None:
    """Gradients are sums in another order, which moved weights by 3e-8; the four steps move most by 1e-3.

    Each process has BatchNorms of its own, so that one process is not as two.
    """
    expected: dict[str, torch.Tensor] = {}
    for stage in range(4):
        config = write(
            tmp_path,
            f"stage-{stage}",
            distill={"method": method},
            student=student,
            train={"total_epochs": 1, "max_steps": 4},
            deepspeed={"zero_optimization": {"stage": stage}},
        )
        succeeded(run(config) if processes == 1 else run_ranks(config, processes=processes))
        totals = [each["total"] for each in train_records(tmp_path / f"stage-{stage}") if each["kind"] == "train"]
        assert len(set(totals)) == 4
        found = load_file(tmp_path / f"stage-{stage}" / "student.safetensors")
        expected = expected or found
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"teacher": {"compile": "default"}}, "teacher.compile = 'default' with data.name = 'toy_scenes'"),
        ({"teacher": {"cache": {"mode": "read_write"}}}, "teacher.cache.mode = 'read_write'"),
        ({"teacher": {"ensemble": [NETWORK | {"weights": "x"}]}}, "regions are of one teacher; set it to []"),
        (
            {"student": {"model_args": {"min_size": 64}}},
            "student.model_args.min_size = 64 with data.name = 'toy_scenes'",
        ),
        ({"student": {"image_size": 64}}, "student.image_size = 64"),
        ({"train": {"cuda_graph": "on"}}, "train.cuda_graph = 'on'"),
        ({"train": {"precision": "fp16"}}, "train.precision = 'fp16'"),
        ({"distill": {"method": "mlkd"}}, "which needs a second view"),
        ({"distill": {"method": ["unikd", "fitnet"]}}, "unikd takes the levels of regions, fitnet those of images"),
        ({"distill": {"method": "crd"}}, "which needs the input of the classifier"),
        ({"distill": {"method": "blockwise"}}, "which needs the teacher's own blocks"),
        ({"distill": {"method": "ofd"}}, "is not computed by a BatchNorm"),
        ({"student": {"model": "torchvision/resnet18"}}, "no detector 'torchvision/resnet18' for the student"),
        ({"distill": {"method": "unikd", "max_levels": 2}}, "distill.max_levels = 2 with data.name = 'toy_scenes'"),
        (
            {"distill": {"method": "unikd"}, "student": {"feature_nodes": ["layer1"]}},
            "student.feature_nodes: the levels of regions are 0, 1, 2, 3, from fine to coarse, got ('layer1',)",
        ),
        (
            {"distill": {"method": "fgfi"}, "student": {"feature_nodes": ["0"]}},
            "student.feature_nodes = ('0',) and teacher.feature_nodes = None with distill.method = 'fgfi'",
        ),
        (
            {"distill": {"method": "at"}, "student": {"feature_nodes": ["0", "1"]}},
            "those of the student have 4, 8, of the teacher 4, 8, 16, 32, 64; set student.feature_nodes",
        ),
        ({"teacher": {"min_accuracy": 0.5}}, "reaches an AP of 0.0"),
    ],
)
def test_what_is_refused(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    done = run(write(tmp_path, **sections))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


LATER = [pytest.param(name, marks=pytest.mark.long) for name in ("kd", "dkd", "nkd", "fitnet", "at", "none")]


@pytest.mark.parametrize("method", ["fgfi", ["reviewkd", "kd"], *LATER])
def test_methods_train_a_step(tmp_path: Path, method: Any) -> None:
    succeeded(run(write(tmp_path, distill={"method": method}, train={"max_steps": 1})))
    assert result_of(tmp_path / "run")["steps"] == 1


def test_a_method_for_boxes_needs_boxes(tmp_path: Path) -> None:
    sections = {"data": {"name": "digits", "synthetic_samples": 256}, "distill": {"method": "fgfi"}}
    done = run(write(tmp_path, **sections))
    assert done.returncode == 2
    assert "distill.method = 'fgfi' with data.name = 'digits'" in done.stderr
