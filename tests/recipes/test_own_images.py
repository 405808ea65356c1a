"""unikd init: a folder of images becomes a configuration that trains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.real_runs import call
from unikd_fast.recipes.own_images import configuration, look


def write(folder: Path, counts: dict[str, int], *, size: tuple[int, int] = (40, 30)) -> Path:
    """Images whose class is in a colour."""
    random = np.random.default_rng(0)
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 80, (size[1], size[0], 3), np.uint8)
            pixels[..., place % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_of_classes_is_split_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my photos", {"cat": 20, "dog ü": 30})
    done = call("init", "my photos", "--teacher", "cifar/resnet14", "--student", "cifar/resnet8")
    assert done.returncode == 0, done.stderr
    assert (
        "my photos: 2 classes, 42 training and 8 validation images, held out of the same folders; short sides 30"
        in (done.stdout)
    )
    raw = json.loads(Path("my photos.json").read_text())
    assert raw["data"] == {
        "name": "image_folder",
        "root": "my photos",
        "image_size": 32,
        "val_samples": 8,
        "augmentation": {"scale": [0.5, 1.0]},
    }
    assert Path(raw["$schema"]).is_file()
    short = ["train.total_epochs=2", "teacher.training.total_epochs=2", "distill.unikd.head_steps=2", "run.dir=run"]
    options = ["teacher.min_accuracy=0", "data.loader=torchvision", "data.workers=0", "teacher.fidelity.batches=0"]
    run = call("train", "--config", "my photos.json", *(part for each in short + options for part in ("--set", each)))
    assert run.returncode == 0, run.stderr
    found = call("predict", "run", "my photos/cat/0.png", "--json")
    assert {one["class"] for one in json.loads(found.stdout)["classes"]} == {"cat", "dog ü"}


@pytest.mark.parametrize(
    ("size", "expected", "teacher"),
    [((500, 400), 224, "timm/resnet50"), ((110, 100), 96, "timm/resnet50"), ((20, 20), 32, "cifar/resnet56")],
)
def test_sizes_decide_networks_and_weights(tmp_path: Path, size: tuple[int, int], expected: int, teacher: str) -> None:
    for part, count in (("train", 20), ("val", 3)):
        write(tmp_path / part, {"a": count, "b": count}, size=size)
    found = look(tmp_path)
    raw: dict[str, Any] = configuration(tmp_path, found)
    assert (found.val_samples, found.sizes[1]) == (0, min(size))
    assert raw["data"]["image_size"] == expected and "val_samples" not in raw["data"]
    assert raw["teacher"]["model"] == teacher
    assert ("weights" in raw["teacher"]) == ("weights" in raw["student"]) == (expected >= 96)
    assert raw["train"]["global_batch_size"] == 8 and raw["train"]["total_epochs"] == 200


def test_what_is_not_such_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "one", {"a": 5})
    write(tmp_path / "few", {"a": 5, "b": 1})
    (tmp_path / "empty").mkdir()
    write(tmp_path / "good", {"a": 5, "b": 5})
    (tmp_path / "good.json").write_text("mine")
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "broken" / name / f"{i}.png").write_bytes(b"no image")
    cases = [
        ("absent", "absent is not a folder"),
        ("one", "1 folders of classes, the smallest with 5 files; it must hold train/<class>"),
        ("few", "the smallest with 1 files"),
        ("empty", "0 folders of classes"),
        ("broken", "none of the images looked at can be opened"),
        ("good", "--to good.json exists; give another name, or --force"),
    ]
    for folder, said in cases:
        done = call("init", folder)
        assert (done.returncode, done.stdout) == (2, ""), folder
        assert said in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "good.json").read_text() == "mine"
    assert call("init", "good", "--force").returncode == 0
