"""Image classifiers of Hugging Face from folders that save_pretrained wrote, and how their processors make images."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig

from support.hugging_face import convnext, saved, saved_vit, vit
from unikd_fast.models import bare_model, build_model, extract_features, published_preprocessing


def test_a_folder_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    written = vit()
    saved(tmp_path / "vit", written.half())
    model = build_model(f"hf/{tmp_path / 'vit'}", num_classes=7, weights="pretrained", role="teacher")
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert all(torch.equal(value, written.state_dict()[name].float()) for name, value in model.state_dict().items())
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    again = build_model(f"hf/{tmp_path / 'vit'}", num_classes=7, weights=str(tmp_path / "own.safetensors"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("weights", [None, "random"])
def test_random_weights_are_those_of_the_seed(tmp_path: Path, weights: str | None) -> None:
    folder = saved(tmp_path / "convnext", convnext().half())
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(build_model(f"hf/{folder}", num_classes=5, weights=weights, model_args={"drop_path_rate": 0.1}))
    assert built[0].config.drop_path_rate == 0.1
    assert built[0].classifier.weight.shape == (5, 32) and built[0].classifier.weight.dtype == torch.float32
    for one, other in zip(built[0].parameters(), built[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("body", [False, True])
def test_a_new_classifier_only_where_it_is_allowed(
    tmp_path: Path, body: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "unikd_fast")
    written = vit()
    folder = saved(tmp_path / "vit", written.vit if body else written)
    name, count = f"hf/{folder}", "no classifier" if body else "7 classes"
    with pytest.raises(ValueError, match=f"teacher.model = {name}: its weights have {count}.*set teacher.training to"):
        build_model(name, num_classes=3, weights="pretrained", role="teacher")
    model = build_model(name, num_classes=3, weights="pretrained", new_classifier=True, role="student")
    assert "a new classifier for 3 classes, the weights" in caplog.text
    assert model.classifier.weight.shape == (3, 48) and model.classifier.weight.std() > 0
    own, theirs = model.state_dict(), written.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in own if "classifier" not in key)


def test_levels_of_both_kinds(tmp_path: Path) -> None:
    shapes = {}
    for name, network, size in (("vit", vit(), 32), ("convnext", convnext(), 64)):
        folder = saved(tmp_path / name, network)
        shapes[name] = extract_features(bare_model(f"hf/{folder}", num_classes=5), image_size=size).level_shapes
    assert shapes == {
        "vit": ((48, 4, 4),) * 4,
        "convnext": ((8, 16, 16), (16, 8, 8), (24, 4, 4), (32, 2, 2)),
    }


def test_what_is_not_such_a_folder_is_refused(tmp_path: Path) -> None:
    folder = saved_vit(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    BertConfig().save_pretrained(tmp_path / "bert")
    torn = saved_vit(tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"torn")
    lean = saved_vit(tmp_path / "lean")
    (lean / "model.safetensors").unlink()
    cases: list[tuple[str, dict[str, Any], str]] = [
        (f"{tmp_path}/absent", {}, "there is no such folder, nor such a model on the hub"),
        ("a b", {}, "there is no such folder, nor such a model on the hub"),
        (
            str(tmp_path / "empty"),
            {},
            r"cannot be used \(ValueError: Unrecognized model.*give a folder that save_pretrained wrote",
        ),
        (str(tmp_path / "bert"), {}, "transformers has no image classifier of a bert"),
        (str(torn), {"weights": "pretrained"}, "cannot be used"),
        (str(lean), {"weights": "pretrained"}, r"cannot be used \(OSError"),
        (str(folder), {"weights": "a1_in1k"}, "has no weights 'a1_in1k'; nearest: pretrained"),
        (str(folder), {"model_args": {"hiden_size": 24}}, "has no 'hiden_size' .*model_args; nearest: hidden_size"),
        (str(folder), {"model_args": {"hidden_act": "nope"}}, "student.model_args"),
        (str(folder), {"weights": "pretrained", "model_args": {"image_size": 64}}, "correct student.model_args"),
        (str(folder), {"weights": "pretrained", "model_args": {"num_hidden_layers": 5}}, "its weights have no vit"),
    ]
    for name, settings, said in cases:
        with pytest.raises(ValueError, match=said) as caught:
            build_model(f"hf/{name}", num_classes=7, role="student", **settings)
        assert "student" in str(caught.value) and "\n" not in str(caught.value)


def test_without_network_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.model_info", refuse := Refusing())
    started = time.perf_counter()
    for _ in range(2):
        with pytest.raises(ConnectionError, match=r"hf/owner/name: .*the hub cannot be reached \(no route\); save_pre"):
            build_model("hf/owner/name", num_classes=7, weights="pretrained", role="teacher")
        assert published_preprocessing("hf/owner/name", "pretrained") is None
    assert refuse.calls == 1 and time.perf_counter() - started < 5  # transformers' own retries take 23 s


class Refusing:
    calls = 0

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.calls += 1
        raise RuntimeError("no route")


def test_transformers_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers, .*; pip install 'unikd-fast\[hf\]'"):
        build_model("hf/some/name", num_classes=7)


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE, SHORT = {"height": 40, "width": 40}, {"shortest_edge": 40}
CROP = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("processor", "settings", "expected"),
    [
        ("ViT", {"size": SQUARE}, (40, 40, True, "bilinear")),
        ("ConvNext", {"size": SHORT, "crop_pct": 0.8, **IMAGENET}, (40, 50, False, "bicubic")),
        ("ConvNext", {"size": {"shortest_edge": 384}}, (384, 384, True, "bicubic")),
        ("CLIP", {"size": SHORT, **CROP}, (32, 40, False, "bicubic")),
        ("DeiT", {"size": SQUARE, **CROP}, (32, 40, True, "bicubic")),
        ("Levit", {"size": SHORT, "crop_size": {"height": 40, "width": 40}}, (40, 45, False, "bicubic")),
        ("PoolFormer", {"size": SHORT, "crop_pct": 0.8, "crop_size": SQUARE}, (40, 50, False, "bicubic")),
        ("EfficientNet", {"size": SQUARE, "resample": 0, **IMAGENET}, (40, 40, True, "bilinear")),
        ("ViT", {"size": SQUARE, "rescale_factor": 1 / 127.5, **IMAGENET}, (40, 40, True, "bilinear")),
        ("ViT", {"size": SQUARE, "do_rescale": False}, (40, 40, True, "bilinear")),
        ("ViT", {"size": SQUARE, "do_normalize": False}, (40, 40, True, "bilinear")),
    ],
)
def test_processors_are_followed(tmp_path: Path, processor: str, settings: dict[str, Any], expected: Any) -> None:
    """Their images are compared with ours as they are read."""
    folder = saved(tmp_path / "network", vit(), processor, **settings)
    found = published_preprocessing(f"hf/{folder}", "pretrained")
    assert found is not None
    assert (found.image_size, found.short_side(found.image_size), found.squash, found.interpolation) == expected
    assert published_preprocessing(f"hf/{folder}", "random") is None
    black = torch.zeros(3)
    if not settings.get("do_normalize", True):
        assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)
    elif processor == "ConvNext" and "image_mean" in settings:
        shown = (black - torch.tensor(found.mean)) / torch.tensor(found.std)
        assert shown.tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


@pytest.mark.parametrize(
    ("processor", "change", "said"),
    [
        ("MobileViT", {}, "it takes blue, green and red, in this order"),
        ("ViT", {"do_resize": False}, r"an image of 512x384 pixels becomes \(3, 384, 512\)"),
        ("ViT", {"image_mean": [0.5]}, "mean must be three finite numbers"),
        ("ViT", {"size": {"height": 32, "width": 48}}, "becomes"),
        ("Perceiver", {}, "becomes"),
    ],
)
def test_odd_processors_are_refused(tmp_path: Path, processor: str, change: dict[str, Any], said: str) -> None:
    folder = saved(tmp_path / "network", vit(), processor)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(
        ValueError, match=f"its processor, a {processor}ImageProcessor, .*{said}.*of your own, <module>"
    ):
        published_preprocessing(f"hf/{folder}", "pretrained")


def test_other_images_than_described_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "network", vit(), "CLIP", size={"shortest_edge": 40}, **CROP)
    from transformers import CLIPImageProcessor

    monkeypatch.setattr(CLIPImageProcessor, "center_crop", lambda self, image, *args, **kwargs: image[..., :32, :32])
    with pytest.raises(ValueError, match="makes other images than resize, central crop, mean and deviation do"):
        published_preprocessing(f"hf/{folder}", "pretrained")


def test_no_processor_is_no_preprocessing(tmp_path: Path) -> None:
    assert published_preprocessing(f"hf/{saved(tmp_path / 'vit', vit())}", "pretrained") is None
