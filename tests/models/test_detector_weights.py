"""Weights of detectors: files of our own, COCO's rows by name, and bodies."""

import logging
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import overwrite_eps

from support.zoo_files import as_pickle
from unikd_fast.models.detector_weights import COCO_CLASSES, COCO_ROWS
from unikd_fast.models.faster_rcnn import build_detector, faster_rcnn

NARROW: dict[str, Any] = {"out_channels": 8, "representation_size": 16}
R18, R50 = "frcnn/torchvision/resnet18", "frcnn/torchvision/resnet50"
THREE = ("dog", "person", "tv")


def saved(state: dict[str, Tensor], path: Path) -> str:
    torch.save(state, path)
    return str(path)


def made(name: str, num_classes: int, seed: int = 0, **arguments: Any) -> FasterRCNN:
    """Return a detector whose norms have statistics and weights of their own."""
    torch.manual_seed(seed)
    network = build_detector(name, num_classes=num_classes, model_args={**NARROW, **arguments})
    for tensor in network.backbone.body.buffers():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return network.eval()


def build(name: str, num_classes: int, weights: str | None, **arguments: Any) -> FasterRCNN:
    return build_detector(name, num_classes=num_classes, model_args=NARROW, weights=weights, **arguments).eval()


def predicted(network: FasterRCNN, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Return logits (R, K + 1) and boxes (R, K + 1, 4) of some vectors of the box head."""
    width = network.roi_heads.box_predictor.cls_score.in_features
    logits, moves = network.roi_heads.box_predictor(torch.randn(6, width, generator=torch.manual_seed(seed)))
    return logits, moves.unflatten(1, (-1, 4))


# Files of our own


@pytest.mark.parametrize("prefix", ["", "module.network.plain."])
def test_own_file(tmp_path: Path, prefix: str) -> None:
    source = made(R18, 4)
    path = saved({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "own.pth")
    found = build(R18, 4, path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())


def test_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = made(R18, 4)
    path = saved(source.state_dict(), tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"have 4 classes and the teacher 6; set teacher.training"):
        build(R18, 6, path, role="teacher")
    with pytest.raises(ValueError, match=r"have 4 classes and the student 6; set num_classes to 4"):
        build(R18, 6, path, role="student", class_names=list("abcdef"))
    caplog.set_level(logging.INFO, "unikd_fast")
    found = build(R18, 6, path, role="student", new_predictor=True).state_dict()
    assert "a new classifier for 6 classes, the weights" in caplog.text
    assert "are for 4" in caplog.text
    for name, value in source.state_dict().items():
        assert "box_predictor" in name or torch.equal(found[name], value), name
    assert found["roi_heads.box_predictor.bbox_pred.weight"].shape == (28, 16)


def test_another_network(tmp_path: Path) -> None:
    path = saved(made(R18, 4).state_dict(), tmp_path / "own.pth")
    with pytest.raises(ValueError, match=r"own.pth is a checkpoint of another model than the teacher"):
        build(R50, 4, path, role="teacher")
    with pytest.raises(FileNotFoundError, match=r"no file nowhere.pth for the teacher"):
        build(R50, 4, "nowhere.pth", role="teacher")


@pytest.mark.parametrize(
    ("tensor", "rows", "name"),
    [("rpn.head.conv.1.0.weight", 3, "resnet50_fpn_v2"), ("rpn.head.cls_logits.weight", 15, "mobilenet_v3_large_fpn")],
)
def test_other_networks_of_torchvision(tmp_path: Path, tensor: str, rows: int, name: str) -> None:
    path = saved({"rpn.head.cls_logits.weight": torch.ones(3), tensor: torch.ones(rows)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"are of a fasterrcnn_{name}, which is not built here"):
        build(R50, 4, path)


# Pickles


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('executed')",)


def test_pickles_execute_nothing(tmp_path: Path) -> None:
    path = as_pickle({"x": torch.ones(2)}, tmp_path / "harmful.pkl", extra=Harmful())
    with pytest.raises(ValueError, match=r"it holds Python objects that can only be restored by executing code"):
        build(R50, 80, path)
    (tmp_path / "cut.pkl").write_bytes(Path(path).read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut.pkl is damaged, or|cut.pkl cannot be read"):
        build(R50, 80, str(tmp_path / "cut.pkl"))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_arrays(tmp_path: Path, protocol: int) -> None:
    source = made(R18, 4)
    path = as_pickle(source.state_dict(), tmp_path / "own.pkl", protocol, iteration=np.int64(9))
    found = build(R18, 4, path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_files_that_end_in_pkl(tmp_path: Path, is_zip: bool) -> None:
    source = made(R18, 4)
    path = tmp_path / "own.pkl"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=is_zip)
    assert torch.equal(predicted(build(R18, 4, str(path)))[0], predicted(source)[0])


# COCO's rows


def with_rows(chosen: list[int], network: FasterRCNN) -> tuple[Tensor, Tensor]:
    logits, moves = predicted(network)
    return logits[:, chosen], moves[:, chosen]


@pytest.fixture(scope="module")
def coco() -> FasterRCNN:
    """Return a network of torchvision's 91 rows, whose norms have no ε, as its published one."""
    network = made(R50, 90)
    overwrite_eps(network, 0.0)
    for name, tensor in network.named_buffers():
        if name.endswith("running_var"):
            tensor.log_().mul_(6).exp_()  # from 0.02 to 11
            tensor[0] = 1e-9  # a dead channel
        if name.endswith("running_mean"):
            tensor.mul_(0.1)
            tensor[0] = 0
    return network


def coco_weights(kind: str, coco: FasterRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if kind == "file":
        return saved(coco.state_dict(), tmp_path / "coco.pth")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: coco.state_dict())
    return kind


@pytest.mark.parametrize("kind", ["file", "COCO_V1", "pretrained"])
def test_coco_rows_by_name(kind: str, coco: FasterRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = coco_weights(kind, coco, tmp_path, monkeypatch)
    network = build(R50, 3, weights, class_names=THREE, role="teacher")
    expected = with_rows([0, 18, 1, 72], coco)  # by the ids of COCO
    torch.testing.assert_close(predicted(network), expected)
    # The body computes what it did without ε: its weights were only rounded.
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = network.double().backbone(image), coco.double().backbone(image)
    coco.float()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() < 1e-5 * value.norm()  # fp32's 6e-8 over 53 convolutions


def test_coco_names() -> None:
    assert len(COCO_ROWS) == 91
    assert len(COCO_CLASSES) == 80
    assert COCO_CLASSES[0] == "person"
    assert COCO_CLASSES[-1] == "toothbrush"


def test_classes_that_coco_lacks(
    coco: FasterRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = coco_weights("COCO_V1", coco, tmp_path, monkeypatch)
    names = ["dog", "unicorn", "N/A"]
    with pytest.raises(ValueError, match=r"COCO's 80 classes, which lack 'unicorn', 'N/A' of the data's 3; name"):
        build(R50, 3, weights, class_names=names, role="teacher")
    caplog.set_level(logging.INFO, "unikd_fast")
    network = build(R50, 3, weights, class_names=names, role="student", new_predictor=True)
    assert "a new classifier for 3 classes" in caplog.text
    assert torch.equal(network.rpn.head.cls_logits.weight, coco.rpn.head.cls_logits.weight)


def test_as_many_classes_of_another_data_set(tmp_path: Path) -> None:
    source = made(R18, 90)
    path = saved(source.state_dict(), tmp_path / "own.pth")
    found = build(R18, 90, path, class_names=[f"part {i}" for i in range(90)])
    assert torch.equal(predicted(found)[0], predicted(source)[0])


def test_identifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(ConnectionError, match=r"could not download weights 'COCO_V1' of frcnn/torchvision/resnet50"):
        build(R50, 3, "COCO_V1")
    with pytest.raises(ValueError, match=r"no weights 'COCO_V3'; nearest: COCO_V1"):
        build(R50, 3, "COCO_V3")
    with pytest.raises(ValueError, match=r"no weights 'COCO_V1'; nearest: IMAGENET1K_V1"):
        build(R18, 3, "COCO_V1", new_predictor=True)
    with pytest.raises(ValueError, match=r"weights_key = 'ema' with weights 'COCO_V1', which is not a file"):
        build(R50, 3, "COCO_V1", weights_key="ema")
    with pytest.raises(ValueError, match=r"need torchvision's conventions; remove conventions and stride_in_1x1"):
        build_detector(R50, num_classes=3, model_args={**NARROW, "conventions": "detectron2"}, weights="pretrained")
    with pytest.raises(ValueError, match=r"test_detector_weights:own has no weights to download, got 'COCO_V1'"):
        build_detector("tests.models.test_detector_weights:own", num_classes=3, weights="COCO_V1")


def own(num_classes: int) -> FasterRCNN:
    return faster_rcnn("timm/test_resnet", num_classes=num_classes, **NARROW)


def test_file_of_ones_own_network(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = own(2)
    path = saved(source.state_dict(), tmp_path / "own.pth")
    found = build_detector("tests.models.test_detector_weights:own", num_classes=2, weights=path)
    assert torch.equal(predicted(found)[0], predicted(source)[0])


# Bodies


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize(
    ("body", "classes"),
    [
        ("torchvision/resnet18", 1000),
        ("torchvision/mobilenet_v2", 10),
        ("timm/test_resnet", 7),
        ("timm/convnext_atto", 5),
    ],
)
def test_body_of_a_classifier(tmp_path: Path, body: str, classes: int, norm: str) -> None:
    torch.manual_seed(1)
    source, _, name = body.partition("/")
    make = torchvision.models.get_model if source == "torchvision" else timm.create_model
    classifier = make(name, num_classes=classes).eval()
    for tensor in classifier.buffers():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    path = saved({"state_dict": classifier.state_dict()}, tmp_path / "classifier.pth")
    network = build_detector(
        f"frcnn/{body}", num_classes=3, model_args={**NARROW, "norm": norm}, weights=path, role="student"
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = network.backbone.body(images)
        found = [*found.values()] if isinstance(found, dict) else found
        if source == "timm":
            expected = classifier.forward_intermediates(images, intermediates_only=True)[-4:]
        elif name == "mobilenet_v2":
            expected = [classifier.features[: i + 1](images) for i in (3, 6, 13, 17)]
        else:
            expected, x = [], classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(images))))
            for stage in (classifier.layer1, classifier.layer2, classifier.layer3, classifier.layer4):
                expected.append(x := stage(x))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_published_weights_of_a_body(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(2)
    classifier = torchvision.models.resnet18()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: classifier.state_dict())
    caplog.set_level(logging.INFO, "unikd_fast")
    for weights in ("IMAGENET1K_V1", "pretrained"):
        network = build(R18, 3, weights, role="student", new_predictor=True)
        assert torch.equal(network.backbone.body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
        assert (
            f"the body torchvision/resnet18 has the weights {weights}, the rest of the detector is new" in caplog.text
        )
        with pytest.raises(
            ValueError, match=f"{weights} are of the body torchvision/resnet18 alone, .* add teacher.tr"
        ):
            build(R18, 3, weights, role="teacher")
    in_1x1 = {**NARROW, "stride_in_1x1": True}
    with pytest.raises(ValueError, match=r"have their strides in the 3x3 convolutions; remove stride_in_1x1"):
        build_detector(R50, num_classes=3, model_args=in_1x1, weights="IMAGENET1K_V1", role="student")


def test_body_of_another_network(tmp_path: Path) -> None:
    path = saved(torchvision.models.resnet34(num_classes=10).state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(ValueError, match=r"is a checkpoint of another model than the student"):
        build(R18, 3, path, role="student")
