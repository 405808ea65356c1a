"""Every configuration that comes along, and what it needs to be dry-run: small data in the published layouts, and
teachers of random weights where the published ones would lie."""

import pickle
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
import torchvision
from PIL import Image

from support.real_runs import ROOT
from unikd_fast.models import build_model
from unikd_fast.recipes import CIFAR_PAIRS, IMAGENET_PAIRS

CONFIGS = ROOT / "configs"
RECIPES = [path for data in ("cifar100", "imagenet") for path in sorted((CONFIGS / data).rglob("*.json"))]
SINGLE = sorted(path for path in CONFIGS.glob("*.json") if path.name != "schema.json")
TRAIN, TEST = 200, 100
CLASSES = 1000


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def a_few_of_all() -> list[Path]:
    """Of the recipes each method, and with them each pair of networks as often as any other."""
    by_method: dict[Path, list[Path]] = {}
    for path in RECIPES:
        by_method.setdefault(path.parent, []).append(path)
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for paths in by_method.values():
        path = min(paths, key=lambda path: seen[path.parts[-3], path.stem])
        seen[path.parts[-3], path.stem] += 1
        chosen.append(path)
    return chosen


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
