"""Networks by name and published weights by identifier."""

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from torch import nn

from unikd_fast.models import build_model, parameter_count


@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "timm/test_resnet", "timm/test_resnet.r160_in1k", "cifar/vgg8"]
)
@pytest.mark.parametrize("weights", [None, "random"])
def test_each_source_builds_a_plain_classifier(name: str, weights: str | None) -> None:
    model = build_model(name, num_classes=7, weights=weights).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert not torch.equal(logits[0], logits[1])


def test_random_weights_follow_the_seed() -> None:
    torch.manual_seed(3)
    first = build_model("timm/test_resnet", num_classes=5)
    torch.manual_seed(3)
    second = build_model("timm/test_resnet", num_classes=5)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_parameter_count_ignores_buffers_and_counts_shared_tensors_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    assert parameter_count(model) == 12 + 6 + 12
    model[2].weight = model[0].weight
    assert parameter_count(model) == 12 + 6 + 3


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cifar/resnet57", "cifar/resnet56"),
        ("torchvision/resnet51", "torchvision/resnet50"),
        ("torchvison/resnet50", "torchvision/resnet50"),
        ("timm/resnet50x", "timm/resnet50"),
        ("resnet50", "torchvision/resnet50, timm/resnet50"),
        ("wrn_40_2", "cifar/wrn_40_2"),
        ("", "a name is one of torchvision, timm, cifar"),
    ],
)
def test_unknown_names_come_with_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=r"no network .* for the student") as caught:
        build_model(name, num_classes=10, role="student")
    assert nearest in str(caught.value)


def test_detectors_are_no_classifiers() -> None:
    with pytest.raises(ValueError, match="no network"):
        build_model("torchvision/fcos_resnet50_fpn", num_classes=10)


def test_number_of_classes_is_checked() -> None:
    with pytest.raises(ValueError, match="num_classes of the teacher must be 1 or more, got 0"):
        build_model("cifar/resnet8", num_classes=0, role="teacher")


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("tried to download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("torchvision/resnet18", "IMAGENET1K_V1"),
        ("torchvision/resnet18", "DEFAULT"),
        ("timm/resnet18", "a1_in1k"),
        ("timm/resnet18", "pretrained"),
        ("timm/resnet18.a1_in1k", "pretrained"),
    ],
)
def test_class_counts_are_compared_before_downloading(name: str, weights: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_model(name, num_classes=100, weights=weights, role="teacher")
    message = str(caught.value)
    assert "the teacher" in message
    assert "1000 classes" in message
    assert "num_classes is 100" in message
    assert "fc.weight" in message
    assert "set num_classes to 1000, or pass the path" in message


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("torchvision/resnet50", "IMAGENET1K_V3", "no weights 'IMAGENET1K_V3'; nearest: IMAGENET1K_V"),
        ("timm/resnet18", "a4_in1k", "no weights 'a4_in1k'; nearest: a"),
        ("timm/resnet18.nope", "pretrained", "no weights 'nope'"),
        ("cifar/resnet56", "DEFAULT", "no weights to download, got 'DEFAULT' for the teacher; pass the path"),
    ],
)
def test_unknown_identifiers(name: str, weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=1000, weights=weights, role="teacher")


def test_failed_downloads_name_the_identifier_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("timm.models._hub.download_cached_file", unreachable)
    for name, weights in (("torchvision/mobilenet_v2", "IMAGENET1K_V2"), ("timm/test_resnet", "r160_in1k")):
        with pytest.raises(
            ConnectionError, match=f"could not download weights '{weights}' of {name} for the teacher"
        ) as e:
            build_model(name, num_classes=1000, weights=weights, role="teacher")
        assert "pass that path" in str(e.value)


def test_torchvision_identifier_loads_the_published_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.squeezenet1_1()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published.state_dict())
    model = build_model("torchvision/squeezenet1_1", num_classes=1000, weights="DEFAULT")
    for key, value in model.state_dict().items():
        assert torch.equal(value, published.state_dict()[key]), key


def test_timm_identifier_loads_the_published_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_resnet")
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", lambda model, **_: model.load_state_dict(published.state_dict())
    )
    model = build_model("timm/test_resnet", num_classes=1000, weights="pretrained")
    for key, value in model.state_dict().items():
        assert torch.equal(value, published.state_dict()[key]), key
