"""Every shipped configuration and every recipe can be run: its dry run builds the data, both networks and the method.

The data are small, in the published layouts; teachers of random weights lie where the published ones would.
"""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from support.real_runs import ALONE, train_here
from support.scene_files import write_coco
from support.zoo_files import R50, R101, as_pickle, detectron2_state
from unikd_fast.config import ConfigError
from unikd_fast.data.detection.toy_scenes import load_toy_scenes
from unikd_fast.engine.describe import describe
from unikd_fast.models import build_model
from unikd_fast.models.detector_weights import COCO_CLASSES, COCO_ROWS
from unikd_fast.recipes import recipe_names
from unikd_fast.recipes.experiments import read_experiment
from unikd_fast.recipes.pairs import CIFAR_PAIRS, COCO_PAIRS, IMAGENET_PAIRS
from unikd_fast.recipes.settings import CLASSIFIERS
from unikd_fast.report.run_files import read_lines

TRAIN, TEST = 200, 100
CLASSES = 1000
SCENES = 20
SAMPLES = {"cifar100": TRAIN, "imagenet": CLASSES}
RECIPES = recipe_names()
# Every method with the shallowest networks, every pair of networks with one method, and ImageNet's classes once.
METHOD_BY_METHOD = [f"cifar100/{method}/{'vgg8' if method == 'none' else 'vgg13-vgg8'}" for method in CLASSIFIERS]
PAIR_BY_PAIR = [f"cifar100/kd/{pair.name}" for pair in CIFAR_PAIRS if pair.name != "vgg13-vgg8"]
QUICK = [*METHOD_BY_METHOD, *PAIR_BY_PAIR, "imagenet/kd/resnet34-resnet18"]
# The rest of ImageNet, and of each method with CIFAR-100 every third pair: the product of the two has nothing new.
LONG = [
    *[name for name in RECIPES if name.startswith("imagenet/") and name not in QUICK],
    *[name for name in RECIPES if name.startswith("cifar100/") and name not in QUICK][::3],
]
# The smallest pair on COCO, with every kind of loss.
OF_BOXES = "coco/unikd/resnet50-mobilenet_v2"
# Of images as large as the published ones a dry run takes a minute.
SMALLER = ["data.detection.short_sides=[96,128]", "data.detection.long_side=192"]
# The other shipped ones are recipes, as test_experiments.py shows.
SHIPPED = ["digits", "digits_cached", "synthetic", "toy_scenes"]


def write_cifar100(folder: Path) -> Path:
    """TRAIN and TEST images in the files of the published archive."""
    random = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("test", TEST)):
        content = {
            b"fine_labels": [i % 100 for i in range(count)],
            b"data": random.integers(0, 256, (count, 3072), np.uint8),
        }
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(
        pickle.dumps({b"fine_label_names": [b"class_%d" % i for i in range(100)]}, protocol=2)
    )
    return folder


def write_imagenet(folder: Path) -> Path:
    """An image of each of the 1000 classes in both splits."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8))
    image.save(folder / "image.jpg")
    for part in ("train", "val"):
        for label in range(CLASSES):
            place = folder / part / f"n{label:08}"
            place.mkdir(parents=True)
            (place / "image.JPEG").hardlink_to(folder / "image.jpg")
    return folder


def write_teachers(folder: Path) -> Path:
    """Those of CIFAR-100 in the layout of their archive."""
    for pair in CIFAR_PAIRS:
        path = folder / pair.teacher_weights
        if not path.exists():
            path.parent.mkdir(parents=True)
            torch.save({"model": build_model(pair.teacher, num_classes=100).state_dict(), "epoch": 240}, path)
    return folder


def write_torchvision(folder: Path) -> Path:
    """Those of ImageNet where torchvision keeps what it has downloaded; ``folder`` is its TORCH_HOME."""
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    for pair in IMAGENET_PAIRS:
        write_published(folder, pair.teacher.removeprefix("torchvision/"))
    return folder


def write_published(folder: Path, name: str) -> None:
    url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    path = folder / "hub" / "checkpoints" / Path(urlparse(url).path).name
    if not path.exists():
        torch.save(torchvision.models.get_model(name).state_dict(), path)


def write_scenes(folder: Path) -> Path:
    """Toy scenes as COCO publishes its images, with its classes."""
    toy = load_toy_scenes(SCENES)
    names = {name: i for i, name in enumerate(COCO_ROWS)}
    ids = np.array([names[name] for name in COCO_CLASSES])
    write_coco(folder, replace(toy, class_names=COCO_CLASSES, category_ids=ids), ("train", "val"), "jpg")
    for part in ("train", "val"):
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"{part}.json").rename(folder / "annotations" / f"instances_{part}2017.json")
        (folder / part).rename(folder / f"{part}2017")
    return folder


def write_nothing(folder: Path) -> Path:
    return folder


WRITERS = {
    "CIFAR100_ROOT": write_cifar100,
    "IMAGENET_ROOT": write_imagenet,
    "CIFAR100_TEACHERS": write_teachers,
    "TORCH_HOME": write_torchvision,
    "COCO_ROOT": write_scenes,
    "DETECTRON2_ZOO": write_nothing,
}


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the configurations name by environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, write in WRITERS.items():
            patch.setenv(variable, str(write(tmp_path_factory.mktemp(variable))))
        yield


def provide(recipe: str) -> None:
    """Write what a recipe on COCO begins with: large files, of which most tests need none."""
    _, method, networks = recipe.split("/")
    write_published(Path(os.environ["TORCH_HOME"]), networks.rpartition("-")[2])
    for pair in COCO_PAIRS:
        path = Path(os.environ["DETECTRON2_ZOO"]) / pair.teacher_weights
        if pair.networks(method) == networks and not path.exists() and method != "none":
            path.parent.mkdir(parents=True)
            blocks = R101 if "R_101" in path.parts[-3] else R50
            state = detectron2_state(channels=256, width=1024, blocks=blocks)
            as_pickle({name: tensor.float() for name, tensor in state.items()}, path)


def described(config: str | None, recipe: str | None) -> str:
    """Return the dry run, without comparing a teacher that knows nothing with itself."""
    read = read_experiment(config, recipe)
    overrides = SMALLER if read.data.name == "coco" else []
    if read.teacher is not None:
        overrides = [*overrides, "teacher.fidelity.batches=0"]
    read = read_experiment(config, recipe, overrides)
    return describe(read, ALONE)


def assert_described(shipped: str | None, recipe: str | None) -> list[str]:
    config, lines = read_experiment(shipped, recipe), described(shipped, recipe).splitlines()
    found = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    samples, side = SAMPLES.get(config.data.name), config.data.image_size
    of_boxes = {"coco": "short sides 96 to 128 px", "toy_scenes": "short sides 64 to 80 px"}
    size = of_boxes.get(config.data.name, f"{side} x {side}")
    assert size in found["data"] and (samples is None or f" {samples} training samples" in found["data"])
    alone = config.distill.method == "none"
    assert config.student.model in found["network" if alone else "student"]
    assert ("teacher" in found) == (not alone)
    method = found["method"].removeprefix("method    ").partition(": ")[0]
    assert method == ("none, cross-entropy alone" if alone else config.distill.label)
    steps = config.train.total_epochs * int(found["steps"].split()[1])
    assert f"{min(steps, config.train.max_steps or steps)} in all" in found["steps"]
    assert "MiB per process" in found["memory"]
    return [line.strip() for line in lines]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_dry_run_of_what_is_shipped(name: str) -> None:
    assert_described(name, None)


@pytest.mark.parametrize("name", QUICK)
def test_a_dry_run_of_every_method_and_every_pair(name: str) -> None:
    assert_described(None, name)


@pytest.mark.long
def test_a_dry_run_with_boxes() -> None:
    provide(OF_BOXES)
    lines = assert_described(None, OF_BOXES)
    assert "train.milestone_steps = 120000, 160000 are not reached: the run has 26 steps" in lines


@pytest.mark.long
@pytest.mark.parametrize("method", ["unikd", "dkd_reviewkd"])
def test_a_recipe_with_boxes_trains(method: str, tmp_path: Path) -> None:
    name = OF_BOXES.replace("unikd", method)
    provide(name)
    made = [*SMALLER, f"run.dir={tmp_path / 'run'}", "train.max_steps=2", "run.log_every_steps=1", "data.workers=0"]
    train_here(read_experiment(None, name, made))
    records = [each for each in read_lines(tmp_path / "run" / "metrics.jsonl") if each["kind"] == "train"]
    assert [each["lr"] for each in records] == pytest.approx([0.01 / 1000, 0.02 / 1000])


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("coco/") and name != OF_BOXES])
def test_a_dry_run_of_all_others_with_boxes(name: str) -> None:
    provide(name)
    assert_described(None, name)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_a_dry_run_of_others(name: str) -> None:
    assert_described(None, name)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_TEACHERS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"vgg13_vanilla/ckpt_epoch_240\.pth"):
        described(None, "cifar100/kd/vgg13-vgg8")
    monkeypatch.setenv("DETECTRON2_ZOO", str(tmp_path))
    write_published(Path(os.environ["TORCH_HOME"]), "mobilenet_v2")  # the student's body is there
    with pytest.raises(ConfigError, match=r"faster_rcnn_R_50_FPN_3x/137849458/model_final_280758\.pkl"):
        described(None, OF_BOXES)
    monkeypatch.delenv("CIFAR100_ROOT")
    with pytest.raises(ConfigError, match="CIFAR100_ROOT"):
        described(None, "cifar100/kd/vgg13-vgg8")
