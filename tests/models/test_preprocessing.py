"""How images are made for a network: what timm and torchvision publish, and what our files say of themselves."""

import json
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from unikd_fast.models import Preprocessing, StudentCard, published_preprocessing, stored_preprocessing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OWN = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", 32 / 37, False, 32)
CARD = StudentCard("my_models:Net", {"width": 8}, 2, ("a, b", "ü"), OWN)


def test_preprocessing_matches_timm_for_all_weights() -> None:
    names = timm.list_pretrained()
    found: Counter[str] = Counter()
    for full in names:
        arch, _, tag = full.partition(".")
        wanted = resolve_data_config(pretrained_cfg=get_pretrained_cfg(full).to_dict())
        preprocessing = published_preprocessing(f"timm/{arch}", tag)
        assert preprocessing is not None
        assert (preprocessing.mean, preprocessing.std) == (wanted["mean"], wanted["std"]), full
        size = wanted["input_size"][-1]
        short_side = max(size, int(size / wanted["crop_pct"]))
        assert (preprocessing.interpolation, preprocessing.image_size) == (wanted["interpolation"], size), full
        assert (preprocessing.short_side(size), preprocessing.squash) == (short_side, wanted["crop_mode"] == "squash")
        found["other mean or std"] += (preprocessing.mean, preprocessing.std) != IMAGENET
        found["0.5"] += preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
        found["bicubic"] += preprocessing.interpolation == "bicubic"
        found["other crop"] += preprocessing.crop_pct != 0.875
        found["squash"] += preprocessing.squash
    if timm.__version__ == "1.0.31":
        assert len(names) == 1826
        assert found == {"other mean or std": 683, "0.5": 430, "bicubic": 1659, "other crop": 1398, "squash": 131}


def test_preprocessing_matches_torchvision_transforms() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        for tag, entry in torchvision.models.get_model_weights(name).__members__.items():
            transform, found = entry.transforms(), published_preprocessing(f"torchvision/{name}", tag)
            assert found is not None
            assert [list(found.mean), list(found.std)] == [list(transform.mean), list(transform.std)], (name, tag)
            assert found.interpolation == transform.interpolation.value
            assert [found.image_size] == transform.crop_size
            assert [found.short_side(found.image_size)] == transform.resize_size


@pytest.mark.parametrize("name", ["vit_base_patch16_224.augreg_in21k", "naflexvit_base_patch16_siglip.v2_webli"])
def test_the_crop_matches_timm(name: str) -> None:
    """At another size of the images too."""
    config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
    found = published_preprocessing(f"timm/{name}", "pretrained")
    assert found is not None
    for size in (found.image_size, 160):
        resize, crop, *_ = create_transform(**{**config, "input_size": (3, size, size)}).transforms
        assert isinstance(resize, Resize) and isinstance(crop, CenterCrop)
        side = found.short_side(size)
        asked = [resize.size] if isinstance(resize.size, int) else list(resize.size)
        assert asked == [side] * (2 if found.squash else 1)
        assert resize.interpolation is InterpolationMode.BICUBIC and found.interpolation == "bicubic"


@pytest.mark.parametrize(
    ("name", "weights", "like"),
    [
        ("timm/vit_base_patch16_224", "folder/teacher.pth", "augreg2_in21k_ft_in1k"),  # the first of its name
        ("timm/vit_base_patch16_224.mae", "teacher.pth", "mae"),
        ("timm/vit_base_patch16_224", "pretrained", "augreg2_in21k_ft_in1k"),
        ("torchvision/resnet50", "teacher.safetensors", "IMAGENET1K_V2"),
        ("torchvision/efficientnet_v2_l", "teacher.pth", "IMAGENET1K_V1"),
    ],
)
def test_a_file_is_treated_as_the_default_weights(name: str, weights: str, like: str) -> None:
    assert published_preprocessing(name, weights) == published_preprocessing(name.partition(".")[0], like)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("timm/vit_base_patch16_224", None),
        ("torchvision/resnet50", "random"),
        ("cifar/resnet20", "teacher.pth"),
        ("timm/no_such_network", "teacher.pth"),
        ("torchvision/no_such_network", "DEFAULT"),
    ],
)
def test_unpublished_preprocessing_is_none(name: str, weights: str | None) -> None:
    assert published_preprocessing(name, weights) is None


def test_the_test_crop_is_used_at_its_size() -> None:
    crops = [published_preprocessing("timm/resnet50", "a1_in1k", image_size=size) for size in (None, 224, 288, 160)]
    assert [(crop.crop_pct, crop.image_size) for crop in crops if crop] == [
        (0.95, 224),
        (0.95, 224),
        (1, 288),
        (0.95, 224),
    ]


def test_metadata_in_the_file_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    save_file({"weight": torch.zeros(1)}, path, CARD.in_words())
    assert StudentCard.read(path) == CARD == StudentCard.from_dict(json.loads(json.dumps(CARD.as_dict())))
    assert published_preprocessing("timm/vit_base_patch16_224", str(path)) == stored_preprocessing(path) == OWN
    assert OWN.short_side(32) == 37
    save_file({"weight": torch.zeros(1)}, path)
    assert stored_preprocessing(path) is None
    assert StudentCard.read(path) is None
    save_file({"weight": torch.zeros(1)}, path, {**CARD.in_words(), "student": "{}"})
    with pytest.raises(ValueError, match=r"the metadata 'student' of .*student.safetensors cannot be used"):
        StudentCard.read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"std": [0.2, 0.2, 0.0]}, "std must be three finite numbers above 0.0"),
        ({"mean": [0.5, 0.5]}, "mean must be three finite numbers"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean must be three finite numbers"),
        ({"interpolation": "nearest"}, "interpolation must be one of"),
        ({"crop_pct": 1e-300}, r"crop_pct must be a number in \[0.01, 100\]"),
        ({"image_size": "32"}, "image_size an int of at least 1, got False and '32'"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ],
)
def test_malformed_metadata_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "student.safetensors"
    fields = json.loads(CARD.in_words()["preprocessing"])
    save_file({"weight": torch.zeros(1)}, path, {"preprocessing": json.dumps({**fields, **change})})
    with pytest.raises(ValueError, match=said) as caught:
        stored_preprocessing(path)
    assert str(path) in str(caught.value)
