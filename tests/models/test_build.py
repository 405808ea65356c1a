"""Networks by name and published weights by identifier."""

from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from torch import nn

from unikd_fast.engine.folder import export_student
from unikd_fast.models import bare_model, build_model, has_published_weights, parameter_count


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


def test_random_weights_depend_on_the_seed() -> None:
    torch.manual_seed(3)
    first = build_model("timm/test_resnet", num_classes=5)
    torch.manual_seed(3)
    second = build_model("timm/test_resnet", num_classes=5)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_parameter_count_excludes_buffers_and_repeats() -> None:
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
def test_unknown_names_list_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=r"no network .* for the student") as caught:
        build_model(name, num_classes=10, role="student")
    assert nearest in str(caught.value)


def test_detectors_are_not_offered_as_classifiers() -> None:
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
    assert "set teacher.training to fine-tune it with a new classifier, or pass the path" in message


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


def test_pretrained_weights_get_a_new_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "unikd_fast")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    published = torchvision.models.squeezenet1_1()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / Path(urlparse(url).path).name)
    same = build_model("torchvision/squeezenet1_1", num_classes=1000, weights="pretrained", new_classifier=True)
    assert all(torch.equal(value, published.state_dict()[name]) for name, value in same.state_dict().items())
    assert not caplog.text
    own = build_model(
        "torchvision/squeezenet1_1", num_classes=5, weights="pretrained", new_classifier=True, role="student"
    ).state_dict()
    for name, value in published.state_dict().items():
        if name.startswith("classifier."):
            assert own[name].shape[0] == 5
        else:
            assert torch.equal(own[name], value)
    assert "student: a new classifier for 5 classes, the weights IMAGENET1K_V1 are for 1000" in caplog.text


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


@pytest.fixture(scope="module")
def googlenet() -> nn.Module:
    """As torchvision returns it with published weights."""
    torch.manual_seed(0)
    model = torchvision.models.GoogLeNet(10, aux_logits=False, transform_input=True, init_weights=False)
    for module in model.modules():  # so that it tells images apart
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.05)
    return model.eval()


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_googlenet_from_a_file(tmp_path: Path, googlenet: nn.Module, ending: str, prefix: str) -> None:
    path = tmp_path / f"googlenet.{ending}"
    state = {prefix + name: tensor for name, tensor in googlenet.state_dict().items()}
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    model = build_model("torchvision/googlenet", num_classes=10, weights=str(path)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), googlenet(images))


@pytest.mark.parametrize("auxiliary", [True, False])
def test_inception_gets_the_auxiliary_head_of_its_file(auxiliary: bool) -> None:
    with torch.device("meta"):
        state = torchvision.models.Inception3(10, auxiliary, init_weights=False).state_dict()
        model = bare_model("torchvision/inception_v3", num_classes=10, weights="a.pth", state=state)
    assert model.transform_input
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("transforms", [True, False])
def test_an_exported_student_states_its_options(tmp_path: Path, transforms: bool) -> None:
    path = tmp_path / "student.safetensors"
    student = torchvision.models.GoogLeNet(10, transform_input=transforms, init_weights=False)
    export_student(student, path)
    model = build_model("torchvision/googlenet", num_classes=10, weights=str(path))
    assert model.transform_input == transforms
    assert model.aux1 is not None


def test_random_networks_match_torchvision() -> None:
    assert not build_model("torchvision/googlenet", num_classes=2, weights=None).transform_input


WITH_OPTIONS = [
    (name, member)
    for name in torchvision.models.list_models(module=torchvision.models)
    for member in sorted({entry.name for entry in torchvision.models.get_model_weights(name)})
    if name.startswith("vit_b") or name in ("googlenet", "inception_v3", "maxvit_t")
]


@pytest.mark.parametrize(("name", "member"), WITH_OPTIONS)
def test_files_get_the_options_of_published_weights(
    name: str, member: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = torchvision.models.get_model_weights(name)[member]
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, *arguments, **options: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda self, *arguments, **options: None)
    with torch.device("meta"):
        published = build_model(f"torchvision/{name}", num_classes=1000, weights=member)
        state = published.state_dict()
        file = bare_model(f"torchvision/{name}", num_classes=1000, weights=str(tmp_path / "a.pth"), state=state)
        known = bare_model(f"torchvision/{name}", num_classes=1000, weights=member)
    for model in (file, known):
        assert {key: value.shape for key, value in model.state_dict().items()} == {
            key: value.shape for key, value in state.items()
        }
        for option in ("transform_input", "image_size"):
            assert getattr(model, option, None) == getattr(published, option, None)


def test_timm_tags_imply_no_options() -> None:
    """Of what timm takes from a pretrained configuration only the number of classes differs between tags."""
    full_names = timm.list_pretrained()
    assert len(full_names) > 1000
    for full in full_names:
        default, tagged = get_pretrained_cfg(full.split(".")[0]).to_dict(), get_pretrained_cfg(full).to_dict()
        assert tagged.get("global_pool") == default.get("global_pool"), full
        assert tagged["input_size"][0] == default["input_size"][0], full
        assert not tagged.get("fixed_input_size") or tagged["input_size"] == default["input_size"], full


def test_a_tag_in_the_name_sets_its_configuration(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "a.pth")
    model = build_model("timm/test_resnet.r160_in1k", num_classes=3, weights=str(tmp_path / "a.pth"))
    assert model.pretrained_cfg["tag"] == "r160_in1k"
    with pytest.raises(ValueError, match="no weights 'nope'"):
        build_model("timm/test_resnet.nope", num_classes=3)


def test_a_detector_has_the_weights_of_its_body() -> None:
    names = ("frcnn/torchvision/resnet18", "frcnn/timm/convnext_atto", "frcnn/timm/resnet50t")
    assert [has_published_weights(name) for name in names] == [True, True, False]
    with pytest.raises(ValueError, match="no network 'torchvision/resnet19'"):
        has_published_weights("frcnn/torchvision/resnet19")
