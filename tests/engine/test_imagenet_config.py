"""The shipped ImageNet experiment trains as it stands from a small folder in ImageNet's layout, through DALI."""

import json
import shutil
from pathlib import Path

import pytest

from support.generated_images import write_jpegs
from support.real_runs import ROOT, run
from unikd_fast.cli import main as unikd
from unikd_fast.data.dali import dali_problem

CONFIG = ROOT / "configs" / "imagenet_r50_mbv1.json"
TRAIN, VAL, BATCH = 40, 13, 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(dali_problem() is not None, reason=f"DALI does not work here: {dali_problem()}"),
]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    return write_jpegs(root, {"train": TRAIN, "val": VAL}, sides=((400, 500), (375, 500), (500, 333)), classes=10)


def settings(root: Path, run_dir: Path, **more: str) -> list[str]:
    """What makes the experiment small; all else is as shipped: pair of networks, sizes, bf16, method."""
    keys = {
        "data.root": root,
        "data.num_classes": 10,
        "teacher.weights": "random",
        "train.global_batch_size": BATCH,
        "train.max_steps": 3,
        "run.log_every_steps": 1,
        "run.dir": run_dir,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]


def test_the_shipped_config_trains(imagenet: Path, tmp_path: Path) -> None:
    done = run(CONFIG, *settings(imagenet, tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert said.count("data.loader: image files are decoded by DALI") == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3]
    (evaluation,) = (record for record in records if record["kind"] == "evaluation")
    assert evaluation["samples"] == VAL  # 13 in batches of 4: none is missing, none counts twice
    assert (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.long
def test_packed_images_give_the_same_losses(imagenet: Path, tmp_path: Path) -> None:
    # Files that are packed as they are have the same pixels.
    assert unikd(["data", "pack", str(imagenet), str(tmp_path / "arrow")]) == 0
    losses = []
    for name, root in (("imagenet", imagenet), ("arrow", tmp_path / "arrow")):
        small = settings(root, tmp_path / f"{name}-run", data__name=name, data__image_size="64", train__max_steps="2")
        assert run(CONFIG, *small).returncode == 0
        lines = (tmp_path / f"{name}-run" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["total"] for line in lines if json.loads(line)["kind"] == "train"])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_an_unsorted_validation_folder_is_explained(imagenet: Path, tmp_path: Path) -> None:
    # ImageNet's validation archive unpacks to one flat folder.
    shutil.copytree(imagenet / "train", tmp_path / "train")
    (tmp_path / "val").mkdir()
    for path in (imagenet / "val").rglob("*.jpg"):
        shutil.copy(path, tmp_path / "val" / f"ILSVRC2012_val_{path.stem}.JPEG")
    done = run(CONFIG, *settings(tmp_path, tmp_path / "run"))
    assert done.returncode == 2
    assert "val/<class>/" in done.stderr
    assert str(tmp_path / "val") in done.stderr
