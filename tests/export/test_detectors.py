"""The ONNX file of a detector finds what the plain network finds, in images of any size."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unikd_fast.data.detection.toy_scenes import load_toy_scenes
from unikd_fast.errors import ConfigError, FileError, RunError
from unikd_fast.export import detectors
from unikd_fast.export.detect import Detected, detect_in
from unikd_fast.export.detectors import (
    Objects,
    OneImage,
    check_detector_format,
    difference,
    open_detector,
    write_detector,
)
from unikd_fast.io import write_json
from unikd_fast.models import Preprocessing, StudentCard
from unikd_fast.models.faster_rcnn import build_detector

SMALL = {
    "norm": "batch",
    "frozen_stages": 0,
    "out_channels": 8,
    "representation_size": 16,
    "anchor_sizes": [12, 20, 32, 48, 64],
    "box_score_thresh": 0.5,
    "rpn_post_nms_top_n_test": 200,
}

NMS = {"rpn_nms_thresh": 0.6, "box_nms_thresh": 0.1}


class Written(NamedTuple):
    path: Path
    card: StudentCard
    tensors: dict[str, Tensor]


def write(folder: Path, conventions: str, body: str = "timm/test_resnet", spread: float = 1.0) -> Written:
    preprocessing = Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", 1.0, False, 64)
    arguments = SMALL | {"conventions": conventions}
    card = StudentCard(f"frcnn/{body}", arguments, 4, None, preprocessing, long_side=96)
    torch.manual_seed(0)
    plain = build_detector(card.model, num_classes=4, model_args=arguments)
    with torch.no_grad():
        for norm in (each for each in plain.modules() if isinstance(each, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1)
        plain.roi_heads.box_predictor.cls_score.weight.mul_(spread)
    written = Written(folder / f"{conventions}.onnx", card, plain.state_dict())
    agreement = write_detector(card, written.tensors, written.path, None)
    assert agreement.difference <= agreement.allowed < 1e-3
    return written


@pytest.fixture(scope="module", params=["torchvision", pytest.param("detectron2", marks=pytest.mark.long)])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    spread = {"torchvision": 10.0, "detectron2": 100.0}[request.param]  # so that scores lie around the threshold
    return write(tmp_path_factory.mktemp("file"), request.param, spread=spread)


def scenes() -> list[Tensor]:
    """Five scenes of other sizes than the file was made with."""
    found = load_toy_scenes(34).test.images
    images = [torch.as_tensor(found[i]).float()[None] / 64 - 2 for i in range(5)]
    assert len({each.shape for each in images}) == 5
    return images


def save_scene(path: Path) -> None:
    scene = torch.as_tensor(load_toy_scenes(2).test.images[0])
    Image.fromarray(scene.permute(1, 2, 0).numpy()).save(path, "PNG")


@torch.no_grad()
def test_a_file_finds_what_the_network_finds(written: Written) -> None:
    """Scores and sides up to the rounding of sums in another order: measured 1e-6 and 5e-5 pixels."""
    run = open_detector(written.card, written.path)
    plain = build_detector(written.card.model, num_classes=4, model_args=written.card.model_args)
    plain.load_state_dict(written.tensors)
    network, counts = OneImage(plain), set()
    for image in scenes():
        found, expected = run(image), network(image)
        assert torch.equal(found.labels, expected.labels)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-3)
        counts.add(len(found.scores))
    assert len(counts) > 2


LATER = [pytest.param({name: value}, marks=pytest.mark.long) for name, value in NMS.items()]


@pytest.mark.parametrize("changed", [{"conventions": None}, *LATER])
def test_a_file_of_other_operations_is_refused(written: Written, changed: dict[str, Any]) -> None:
    arguments = written.card.model_args
    other = {"detectron2": "torchvision", "torchvision": "detectron2"}[arguments["conventions"]]
    changed = {"conventions": other} if "conventions" in changed else changed
    plain = build_detector(written.card.model, num_classes=4, model_args=arguments | changed)
    plain.load_state_dict(written.tensors)
    with pytest.raises(RunError, match=r"pixels boxes and scores differ by .* from those of the plain network"):
        detectors._compare(written.path, OneImage(plain), scenes()[:1])


def test_the_page_uses_a_file_as_predict_does(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "long_side" in block)
    monkeypatch.chdir(tmp_path)
    shutil.copy(written.path, "student.onnx")
    write_json(Path("student.json"), written.card.as_dict())
    save_scene(Path("image.jpg"))
    found: dict[str, Any] = {}
    exec(code, found)
    run, image = open_detector(written.card, Path("student.onnx")), Path("image.jpg")
    (expected,) = detect_in(run, written.card, [image], least_score=0, most=100)
    assert isinstance(expected, Detected)
    assert expected.scores
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-5)
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=1e-3)
    assert [str(label - 1) for label in found["labels"]] == [*expected.classes]


def test_a_card_of_other_classes_is_refused(written: Written, tmp_path: Path) -> None:
    save_scene(tmp_path / "scene.png")
    of_one = replace(written.card, num_classes=1)
    run = open_detector(written.card, written.path)
    with pytest.raises(FileError, match="and its card has only 1; export the student again"):
        list(detect_in(run, of_one, [tmp_path / "scene.png"], least_score=0, most=9))


def test_objects_are_compared_by_class_place_and_score() -> None:
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [20.0, 0.0, 29.0, 4.0]])
    objects = Objects(boxes, torch.tensor([0.8, 0.5]), torch.tensor([1, 2]))
    swapped = Objects(*(each.flip(0) for each in objects))
    assert difference(swapped, objects) == 0
    assert difference(objects._replace(boxes=boxes + 0.1), objects) == pytest.approx(0.01, rel=1e-5)
    assert difference(objects._replace(scores=objects.scores * 0.9), objects) == pytest.approx(0.1, rel=1e-5)
    assert difference(objects._replace(labels=objects.labels + 1), objects) == float("inf")
    assert difference(Objects(*(each[:1] for each in objects)), objects) == float("inf")
    nothing = Objects(*(each[:0] for each in objects))
    assert difference(nothing, nothing) == float("inf")
    # One in twenty may be another, and two may not.
    many = Objects(torch.arange(160.0).view(40, 4), torch.linspace(0.9, 0.5, 40), torch.ones(40, dtype=torch.int64))
    for count, allowed in ((1, True), (4, False)):
        labels = many.labels.clone()
        labels[:count] = 2
        assert (difference(many._replace(labels=labels), many) == 0) == allowed


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a.pt", {}, "a detector, which is exported as .safetensors or .onnx; give such a file"),
        ("a.onnx", {"image_size": 64}, "--image-size 64: a detector takes images of any size"),
        ("a.onnx", {"preprocesses": True}, "--preprocess is for classifiers"),
    ],
)
def test_what_a_detector_has_not_is_refused(name: str, options: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_detector_format(Path(name), **{"preprocesses": False, "image_size": None, **options})  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize("body", ["torchvision/resnet50", "torchvision/mobilenet_v2", "timm/convnext_atto"])
def test_bodies_are_exported(tmp_path: Path, body: str) -> None:
    write(tmp_path, "torchvision", body)
