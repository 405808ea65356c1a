"""The configurations of the papers' experiments: checked in as the code states them, valid, and as published."""

import json
from pathlib import Path
from typing import Any

import pytest

from unikd_fast.config import config_hash, load_config
from unikd_fast.recipes import CIFAR_PAIRS, IMAGENET_PAIRS, METHODS, Pair, alone, experiment, experiments

CONFIGS = Path(__file__).parents[2] / "configs"
ALL = dict(experiments())


def test_what_is_checked_in_is_what_the_code_states() -> None:
    on_disk = {
        path.relative_to(CONFIGS).as_posix(): json.loads(path.read_text())
        for data in ("cifar100", "imagenet")
        for path in (CONFIGS / data).rglob("*.json")
    }
    assert on_disk == ALL, "python -m unikd_fast.recipes configs"


def test_there_is_one_for_every_method_and_pair() -> None:
    assert len(CIFAR_PAIRS) == 11 and len(IMAGENET_PAIRS) == 2
    for method in METHODS:
        if method == "none":
            continue
        assert {f"cifar100/{method}/{pair.name}.json" for pair in CIFAR_PAIRS} <= ALL.keys()
    alone = {path.rpartition("/")[2].removesuffix(".json") for path in ALL if path.startswith("cifar100/none/")}
    assert alone == {network.rpartition("/")[2] for pair in CIFAR_PAIRS for network in (pair.teacher, pair.student)}
    for method in ("at", "ofd", "crd", "reviewkd", "kd", "dkd", "unikd"):  # the columns of Table 3
        assert {f"imagenet/{method}/{pair.name}.json" for pair in IMAGENET_PAIRS} <= ALL.keys()


@pytest.mark.parametrize("path", ALL)
def test_every_configuration_is_valid(path: str) -> None:
    config = load_config(CONFIGS / path)
    assert config.run.dir.startswith(f"runs/{path.removesuffix('.json')}-")
    assert (config.distill.method == "none") == (config.teacher is None)


@pytest.mark.parametrize(
    ("pair", "file"), list(zip(IMAGENET_PAIRS, ("imagenet_r34_r18", "imagenet_r50_mbv1"), strict=True))
)
def test_the_first_experiments_are_among_them(pair: Pair, file: str) -> None:
    assert config_hash(load_config(CONFIGS / f"{file}.json")) == config_hash(
        load_config(CONFIGS / "imagenet" / "unikd" / f"{pair.name}.json")
    )


def distill(method: str, pair: str) -> dict[str, Any]:
    section: dict[str, Any] = experiment(method, next(p for p in CIFAR_PAIRS if p.name == pair))["distill"]
    return section


def test_settings_are_the_published_ones() -> None:
    """Retyped from the papers."""
    assert distill("dkd", "resnet56-resnet20")["dkd"]["beta"] == 2
    assert distill("dkd", "wrn_40_2-wrn_40_1")["dkd"]["beta"] == 6
    assert distill("dkd", "vgg13-MobileNetV2")["dkd"]["beta"] == 6
    assert distill("dkd", "resnet32x4-ShuffleV2")["dkd"]["beta"] == 8
    assert distill("reviewkd", "resnet56-resnet20")["reviewkd"]["weight"] == 0.6
    assert distill("reviewkd", "resnet110-resnet32")["reviewkd"]["weight"] == 1
    assert distill("reviewkd", "wrn_40_2-ShuffleV1")["reviewkd"]["weight"] == 5
    assert distill("reviewkd", "ResNet50-MobileNetV2")["reviewkd"]["weight"] == 8
    standardized = distill("dkd_standardized", "resnet110-resnet32")["dkd"]
    assert (standardized["temperature"], standardized["alpha"], standardized["beta"]) == (2, 15, 30)
    assert distill("ofd", "vgg13-vgg8")["ofd"]["weight"] == 1e-3
    assert [experiment("ofd", pair)["distill"]["ofd"]["weight"] for pair in IMAGENET_PAIRS] == [1e-4, 1e-4]
    both = distill("kd_crd", "vgg13-vgg8")  # RepDistiller: -r 1 -a 1 -b 0.8
    assert both == {"method": ["kd", "crd"], "beta": 1.0, "temperature": 4.0, "crd": {"weight": 0.8}}
    assert distill("dkd_reviewkd", "vgg13-vgg8")["method"] == ["dkd", "reviewkd"]
    rates = {pair.name: pair.learning_rate for pair in CIFAR_PAIRS}
    assert {name for name, rate in rates.items() if rate == 0.01} == {
        name for name in rates if name.endswith(("MobileNetV2", "ShuffleV1", "ShuffleV2"))
    }
    train = experiment("kd", CIFAR_PAIRS[0])["train"]
    assert (train["total_epochs"], train["global_batch_size"], train["milestones"]) == (240, 64, [150, 180, 210])


def test_a_teacher_alone_has_the_rate_of_its_data_set() -> None:
    mobile, image = CIFAR_PAIRS[8], IMAGENET_PAIRS[0]
    for pair, network, rate in (
        (mobile, mobile.teacher, 0.05),
        (mobile, mobile.student, 0.01),
        (image, image.teacher, 0.2),
        (image, image.student, 0.2),
    ):
        config = alone(pair, network)
        assert (config["student"]["model"], config["distill"], "teacher" in config) == (
            network,
            {"method": "none"},
            False,
        )
        assert config["train"]["learning_rate"] == rate
