"""Training on images without labels: what runs, what is the same as without them, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from support.long_rounds import quick
from support.real_runs import call, newest_checkpoint, run, run_ranks, train_here, train_records, write_config
from unikd_fast import distill
from unikd_fast.config import ConfigError, load_config
from unikd_fast.config.load import config_hash
from unikd_fast.engine.checkpoint import FOLDER, checkpoint_name
from unikd_fast.methods import OF_IMAGES
from unikd_fast.models import build_model
from unikd_fast.values import NO_LABEL

SIZE = 16
NEEDS = ("dkd", "nkd", "wkd", "crd")
WITHOUT = [name for name in OF_IMAGES if name not in (*NEEDS, "none")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images with a label, 6 to validate on and 20 without a label, of two colours."""
    root, random = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6), ("unlabeled", 20)):
        for i in range(count):
            pixels = random.integers(0, 120, (SIZE, SIZE, 3), np.uint8)
            pixels[..., i % 2] += 120
            folder = root / part / ("" if part == "unlabeled" else "ab"[i % 2])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return root


def config_of(folder: Path, root: Path, method: Any = "kd", *, name: str = "tiny", **sections: Any) -> Path:
    """A run of two epochs of four steps on images with and without labels."""
    data = {
        "name": "image_folder",
        "root": str(root),
        "unlabeled_root": str(root / "unlabeled"),
        "image_size": SIZE,
        "loader": "torchvision",
        "workers": 0,
        "num_classes": None,
        "synthetic_samples": 256,
        **sections.pop("data", {}),
    }
    distill = {"method": method, "teacher_head": None, "alpha_ramp_epochs": None, "head_steps": None}
    if method == "unikd":
        distill |= {"teacher_head": "prefit", "head_steps": 2, "alpha_ramp_epochs": 0.5}
    given = {
        "run": {"probe": False, "test_logits": False, **sections.pop("run", {})},
        "student": {"model": "cifar/resnet8"},
        "train": {"total_epochs": 2, "global_batch_size": 8, "accumulation_steps": 1, **sections.pop("train", {})},
        "distill": {key: value for key, value in distill.items() if value is not None} | sections.pop("distill", {}),
    }
    path = write_config(folder, name=name, data=data, **given, **sections)
    raw = json.loads(path.read_text())
    unset = {key for key in ("teacher_head", "alpha_ramp_epochs", "head_steps") if distill[key] is None}
    raw["distill"] = {key: value for key, value in raw["distill"].items() if key not in unset}
    if raw["teacher"].get("weights") is None:
        del raw["teacher"]["weights"]
    path.write_text(json.dumps(raw))
    return path


def only_unlabelled(folder: Path, root: Path) -> Path:
    """A root with val alone."""
    (folder / "alone").mkdir()
    (folder / "alone" / "val").symlink_to(root / "val")
    return folder / "alone"


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in train_records(folder) if record["kind"] == "train"]  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("method", [*quick(WITHOUT, "kd", "unikd", "mlkd"), ["kd", "fitnet"]], ids=str)
@pytest.mark.parametrize("labels", ["some", "none"])
def test_methods_that_need_no_label_train(tmp_path: Path, root: Path, method: Any, labels: str) -> None:
    """On micro-batches of two, many of which have no label: there the cross-entropy is 0."""
    changes: dict[str, Any] = {"train": {"accumulation_steps": 4}, "loss": {"label_smoothing": 0.1}}
    given = only_unlabelled(tmp_path, root) if labels == "none" else root
    data = {"unlabeled_root": str(root / "unlabeled")}
    folder = train_here(load_config(config_of(tmp_path, given, method, data=data, **changes)))
    found = steps(folder)
    assert len(found) == (8 if labels == "some" else 4)
    assert all(math.isfinite(value) for step in found for value in step.values() if isinstance(value, float))
    assert any(step["ce"] > 0 for step in found) == (labels == "some")
    assert json.loads((folder / "result.json").read_text())["unlabelled"] == 20


@pytest.mark.parametrize("method", [*NEEDS, ["kd", "dkd"]], ids=str)
def test_methods_that_need_labels_are_refused(tmp_path: Path, root: Path, method: Any) -> None:
    done = run(config_of(tmp_path, root, method))
    name = method if isinstance(method, str) else "+".join(method)
    assert done.returncode == 2
    assert f"distill.method = '{name}' needs the class of every training image, and 20 of 32 have no" in done.stderr
    remedy = "leave them out (data.unlabeled_root = null), or use a method that needs none"
    assert f"{remedy}: {', '.join(WITHOUT)}" in done.stderr
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_the_student_alone_learns_from_the_others(tmp_path: Path, root: Path) -> None:
    """To the bit, as if they were not there."""
    folders = [
        train_here(load_config(config_of(tmp_path, root, "none", name=name, data=data)))
        for name, data in (("with", {}), ("without", {"unlabeled_root": None}))
    ]
    records = [train_records(folder) for folder in folders]
    assert records[0] == records[1] and len(steps(folders[0])) == 2
    one, other = (load_file(folder / "student.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_teacher_is_trained_on_the_others(tmp_path: Path, root: Path) -> None:
    teacher = {"model": "cifar/resnet8", "weights": None, "training": {"total_epochs": 3}}
    config = config_of(tmp_path, root, teacher=teacher, run={"test_logits": True})
    done = run(config)
    assert done.returncode == 0, done.stderr
    assert "12 training samples, 2 classes" in done.stderr
    assert "32 training samples, 20 of them without a label, 2 classes" in done.stderr
    assert len(steps(tmp_path / "tiny" / "teacher")) == 3  # of 12 images in batches of 8
    assert "All training samples and 20 without a label" in (tmp_path / "tiny" / "report.md").read_text()
    dry = run(config, "--dry-run")
    assert "image_folder: 32 training samples, 20 of them without a label, 2 classes, 16 x 16" in dry.stdout


@pytest.mark.parametrize("method", ["none", "kd"])
@pytest.mark.parametrize("dry", [True, False])
def test_without_any_label_there_is_none_to_learn_from(tmp_path: Path, root: Path, method: str, dry: bool) -> None:
    given = only_unlabelled(tmp_path, root)
    teacher = {"model": "cifar/resnet8", "weights": None, "training": {"total_epochs": 1}}
    config = config_of(tmp_path, given, method, data={"unlabeled_root": str(root / "unlabeled")}, teacher=teacher)
    done = run(config, *(["--dry-run"] if dry else []))
    assert done.returncode == 2
    assert "learn from labels, and none of the 20 training images has one; give a teacher that is trained already" in (
        done.stderr
    )


def test_a_comparison_has_both(tmp_path: Path, root: Path) -> None:
    runs = {"student alone": {"distill.method": "none"}, "student + KD": {"distill.method": "kd"}}
    done = run(config_of(tmp_path, root, compare={"seeds": [0], "runs": runs}))
    assert done.returncode == 0, done.stderr
    counts = [len(steps(tmp_path / "tiny" / "seed-0" / name)) for name in ("student-alone", "student-kd")]
    assert counts == [2, 8]


def test_outputs_are_cached_for_all_of_them(tmp_path: Path, root: Path) -> None:
    """By sample: a cached run is the online one but for logits in two bytes."""
    curves = []
    for mode in ("off", "read_write"):
        teacher = {"cache": {"mode": mode, "dir": str(tmp_path / "outputs")}}
        folder = train_here(load_config(config_of(tmp_path, root, name=mode, teacher=teacher)))
        curves.append(steps(folder))
    for online, cached in list(zip(*curves, strict=True))[:4]:
        # A logit in fp16 is off by 2^-11 of itself; the small differences of teacher and student by 0.1 % in an epoch.
        assert online["logit_kl"] == pytest.approx(cached["logit_kl"], rel=5e-3)
        assert online["ce"] == pytest.approx(cached["ce"], rel=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, root: Path) -> None:
    config = load_config(config_of(tmp_path, root))
    folder = train_here(config)
    records, whole = train_records(folder), newest_checkpoint(folder)
    for step in (6, 7, 8):
        shutil.rmtree(folder / FOLDER / checkpoint_name(step), ignore_errors=True)
    (folder / "result.json").unlink()
    train_here(config, resume=True)
    assert train_records(folder) == records
    assert newest_checkpoint(folder)["run"]["step"] == whole["run"]["step"] == 8


def test_a_data_set_given_as_an_object_may_lack_labels(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, 3, SIZE, SIZE, generator=generator), torch.arange(24) % 2
    known = TensorDataset(images[:8], labels[:8])
    train = TensorDataset(images, torch.where(torch.arange(24) < 12, labels, NO_LABEL))

    def trained(method: str) -> Path:
        teacher, student = (build_model("cifar/resnet8", num_classes=2) for _ in range(2))
        settings: dict[str, Any] = {"global_batch_size": 4, "trackers": (), "config": {"teacher.min_accuracy": 0}}
        return distill(
            teacher, student, train, known, method=method, epochs=1, dir=tmp_path / method, **settings
        ).folder

    assert [json.loads((trained(method) / "result.json").read_text())["steps"] for method in ("kd", "none")] == [6, 3]
    with pytest.raises(ConfigError, match="12 of 24 have no label; leave them out, or use a method that needs none"):
        trained("dkd")


def test_mixing_needs_all_labels_or_none(tmp_path: Path, root: Path) -> None:
    mixing = {"mixing": {"mixup_alpha": 0.5}}
    done = run(config_of(tmp_path, root, data=mixing))
    assert done.returncode == 2
    assert "mix labels, and 20 of 32 training images have none; set both alphas to 0, or train without" in done.stderr
    given, data = only_unlabelled(tmp_path, root), {"unlabeled_root": str(root / "unlabeled"), **mixing}
    found = steps(train_here(load_config(config_of(tmp_path, given, name="mixed", data=data))))
    assert all(step["ce"] == 0 and step["logit_kl"] > 0 for step in found)


def test_a_folder_moves_without_a_new_experiment(tmp_path: Path, root: Path) -> None:
    with_it, elsewhere, without = (
        config_hash(load_config(config_of(tmp_path, root, data={"unlabeled_root": place})))
        for place in (str(root / "unlabeled"), "${ELSEWHERE}/images", None)
    )
    assert with_it == elsewhere != without


def test_a_command_names_a_folder_that_is_missing(tmp_path: Path, root: Path) -> None:
    done = call("cache", "plan", "--config", config_of(tmp_path, root, data={"unlabeled_root": "absent"}))
    assert done.returncode == 2 and "data.unlabeled_root = absent is missing" in done.stderr


@pytest.mark.long
def test_several_processes_share_them(tmp_path: Path, root: Path) -> None:
    """Of micro-batches of two, many of one process have no label where the other's have."""
    done = run_ranks(config_of(tmp_path, root, train={"accumulation_steps": 2}), processes=2)
    assert done.returncode == 0, done.stderr
    found = steps(tmp_path / "tiny")
    assert len(found) == 8 and all(math.isfinite(step["total"]) for step in found)
