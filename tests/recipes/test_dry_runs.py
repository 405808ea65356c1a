"""Every shipped configuration and every recipe can be run: its dry run builds the data, both networks and the method.

The data are small, in the published layouts; teachers of random weights lie where the published ones would.
"""

import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from support.real_runs import ALONE
from unikd_fast.config import ConfigError
from unikd_fast.engine.describe import describe
from unikd_fast.models import build_model
from unikd_fast.recipes import recipe_names
from unikd_fast.recipes.experiments import read_experiment
from unikd_fast.recipes.pairs import CIFAR_PAIRS, IMAGENET_PAIRS
from unikd_fast.recipes.settings import METHODS

TRAIN, TEST = 200, 100
CLASSES = 1000
SAMPLES = {"cifar100": TRAIN, "imagenet": CLASSES}
RECIPES = recipe_names()
# Every method with the shallowest networks, every pair of networks with one method, and ImageNet's classes once.
METHOD_BY_METHOD = [f"cifar100/{method}/{'vgg8' if method == 'none' else 'vgg13-vgg8'}" for method in METHODS]
PAIR_BY_PAIR = [f"cifar100/kd/{pair.name}" for pair in CIFAR_PAIRS if pair.name != "vgg13-vgg8"]
QUICK = [*METHOD_BY_METHOD, *PAIR_BY_PAIR, "imagenet/kd/resnet34-resnet18"]
# The other shipped ones are recipes, as test_experiments.py shows.
SHIPPED = ["digits", "digits_cached", "synthetic"]


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
        name = pair.teacher.removeprefix("torchvision/")
        url = torchvision.models.get_model_weights(name)[pair.teacher_weights].url
        network = torchvision.models.get_model(name)
        torch.save(network.state_dict(), folder / "hub" / "checkpoints" / Path(urlparse(url).path).name)
    return folder


WRITERS = {
    "CIFAR100_ROOT": write_cifar100,
    "IMAGENET_ROOT": write_imagenet,
    "CIFAR100_TEACHERS": write_teachers,
    "TORCH_HOME": write_torchvision,
}


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the configurations name by environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, write in WRITERS.items():
            patch.setenv(variable, str(write(tmp_path_factory.mktemp(variable))))
        yield


def described(config: str | None, recipe: str | None) -> str:
    """Return the dry run, without comparing a teacher that knows nothing with itself."""
    read = read_experiment(config, recipe)
    if read.teacher is not None:
        read = read_experiment(config, recipe, ["teacher.fidelity.batches=0"])
    return describe(read, ALONE)


def assert_described(shipped: str | None, recipe: str | None) -> None:
    config, lines = read_experiment(shipped, recipe), described(shipped, recipe).splitlines()
    found = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    samples, size = SAMPLES.get(config.data.name), config.data.image_size
    assert f"{size} x {size}" in found["data"] and (samples is None or f" {samples} training samples" in found["data"])
    alone = config.distill.method == "none"
    assert config.student.model in found["network" if alone else "student"]
    assert ("teacher" in found) == (not alone)
    method = found["method"].removeprefix("method    ").partition(": ")[0]
    assert method == ("none, cross-entropy alone" if alone else config.distill.label)
    assert f"{config.train.total_epochs * int(found['steps'].split()[1])} in all" in found["steps"]
    assert "MiB per process" in found["memory"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_dry_run_of_what_is_shipped(name: str) -> None:
    assert_described(name, None)


@pytest.mark.parametrize("name", QUICK)
def test_a_dry_run_of_every_method_and_every_pair(name: str) -> None:
    assert_described(None, name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in QUICK])
def test_a_dry_run_of_all_others(name: str) -> None:
    assert_described(None, name)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_TEACHERS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"vgg13_vanilla/ckpt_epoch_240\.pth"):
        described(None, "cifar100/kd/vgg13-vgg8")
    monkeypatch.delenv("CIFAR100_ROOT")
    with pytest.raises(ConfigError, match="CIFAR100_ROOT"):
        described(None, "cifar100/kd/vgg13-vgg8")
