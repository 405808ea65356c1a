"""unikd init: a folder of images becomes a configuration that trains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.real_runs import call
from unikd_fast.models import build_model
from unikd_fast.recipes.own_images import configuration, look

SMALL = {"augmentation": {"scale": [0.5, 1.0], "eval_resize": 32}}


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
    Path("my photos/cat/boxes.txt").write_text("not an image")
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
        **SMALL,
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


def test_a_network_that_is_named_gets_its_weights(tmp_path: Path) -> None:
    """At any size, and the rate of fine-tuning; from scratch those that have none."""
    write(tmp_path, {"a": 8, "b": 8}, size=(32, 32))
    found = look(tmp_path)
    names = ["timm/tf_efficientnet_lite0", "torchvision/resnet18", "timm/mobilenetv4_conv_small_035", "own:Net"]
    for name, published in zip(names, (True, True, False, False), strict=True):
        raw = configuration(tmp_path, found, teacher=name)
        assert raw["teacher"].get("weights") == ("pretrained" if published else None)
        assert raw["teacher"]["training"].get("learning_rate", raw["train"]["learning_rate"]) == (
            0.01 if published else 0.05
        )
        raw = configuration(tmp_path, found, teacher="cifar/resnet8", student=name)
        assert raw["student"].get("weights") == ("pretrained" if published else None)
        assert (raw["teacher"]["training"].get("learning_rate") == 0.05) == published
        assert raw["train"]["learning_rate"] == (0.01 if published else 0.05)


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
        ("one", "1 folders of classes, the smallest with 5 images; it must hold train/<class>"),
        ("few", "the smallest with 1 images"),
        ("empty", "0 folders of classes"),
        ("broken", "none of the images looked at can be opened"),
        ("good", "--to good.json exists; give another name, or --force"),
    ]
    for folder, said in cases:
        done = call("init", folder)
        assert (done.returncode, done.stdout) == (2, ""), folder
        assert said in done.stderr and "Traceback" not in done.stderr
    done = call("init", "good", "--to", "new.json", "--student", "timm/resnet5O")
    assert (done.returncode, done.stdout) == (2, "") and "nearest: timm/resnet50" in done.stderr
    assert not Path("new.json").exists()
    assert (tmp_path / "good.json").read_text() == "mine"
    assert call("init", "good", "--force").returncode == 0


def test_a_folder_named_unlabeled_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside class folders alone, and elsewhere if it is named; a few labelled images are a batch of their own."""
    monkeypatch.chdir(tmp_path)
    write(Path("parts/train"), {"a": 6, "b": 6})
    write(Path("parts/val"), {"a": 2, "b": 2})
    write(Path("classes"), {"a": 6, "b": 6})
    write(Path("more"), {"monday": 510})
    for folder in ("parts", "classes"):
        Path(folder, "unlabeled").symlink_to(tmp_path / "more")
    cases = [("parts", [], 12, 4), ("classes", [], 10, 2), ("classes", ["--unlabeled", "more"], 10, 2)]
    for folder, options, labelled, held_out in cases:
        if options:
            Path(folder, "unlabeled").unlink()
        done = call("init", folder, *options, "--force")
        assert done.returncode == 0, done.stderr
        count = f"2 classes, {labelled + 510} training (510 without a label) and {held_out} validation images"
        assert count in done.stdout
        raw = json.loads(Path(f"{folder}.json").read_text())
        assert raw["data"]["unlabeled_root"] == (options[1] if options else f"{folder}/unlabeled")
        assert (raw["train"]["global_batch_size"], raw["teacher"]["training"]["global_batch_size"]) == (
            32,
            labelled // 4,
        )
        assert ("val_samples" in raw["data"]) == (folder == "classes")


def test_without_any_label_a_trained_teacher_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("photos/val"), {"a": 2, "b": 2})
    write(Path("photos"), {"train": 40})
    done = call("init", "photos", "--teacher", "cifar/resnet14")
    assert done.returncode == 2
    assert "none of the training images of photos has a label" in done.stderr
    assert "by --teacher NAME and --teacher-weights FILE" in done.stderr
    torch.manual_seed(0)  # some random networks round more in bf16 than is allowed
    torch.save(build_model("cifar/resnet14", num_classes=2).state_dict(), "teacher.pth")
    given = ["--teacher", "cifar/resnet14", "--teacher-weights", "teacher.pth", "--student", "cifar/resnet8"]
    assert call("init", "photos", *given).returncode == 0
    raw = json.loads(Path("photos.json").read_text())
    assert raw["teacher"] == {"model": "cifar/resnet14", "weights": "teacher.pth"}
    assert raw["data"] == {"name": "image_folder", "root": "photos", "image_size": 32, **SMALL}
    options = ["train.max_steps=1", "run.dir=run", "teacher.min_accuracy=0", "distill.unikd.head_steps=1"]
    run = call("train", "--config", "photos.json", *(part for each in options for part in ("--set", each)))
    assert run.returncode == 0, run.stderr
    assert "40 training samples, 40 of them without a label" in run.stderr
