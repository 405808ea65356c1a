"""How the images of a run are made: after the student's weights, else the teacher's; each network sees its own."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from support.real_runs import ALONE, write_config
from unikd_fast.config import load_config
from unikd_fast.engine import inputs
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache import outputs_key, ready_cache
from unikd_fast.engine.classification import CLASSIFICATION
from unikd_fast.engine.distributed import StopSignal
from unikd_fast.engine.folder import export_student
from unikd_fast.engine.teacher import evaluate_teacher
from unikd_fast.models import LogitsOnly, Preprocessing, StudentCard, build_model

SIZE, SAMPLES = 32, {"train": 16, "val": 6}
TEACHER = "timm/test_convnext"  # of 0.5 and bicubic
STUDENT = "torchvision/mobilenet_v3_small"  # of ImageNet and bilinear
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in two classes, and random weights of both networks."""
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    for part, count in SAMPLES.items():
        for i in range(count):
            path = folder / "images" / part / f"class_{i % 2}" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(0, 256, (9, 11, 3), np.uint8))
            coarse.resize((55 + i, 43), Image.Resampling.BICUBIC).save(path)
    torch.manual_seed(0)
    for name, model in (("teacher", TEACHER), ("student", STUDENT)):
        torch.save(build_model(model, num_classes=2).state_dict(), folder / f"{name}.pth")
    return folder


def experiment(files: Path, tmp_path: Path, changes: dict[str, Any] | None = None) -> Experiment:
    """A run on them with {"section.key": value} changed; the student starts from random weights."""
    config = write_config(
        tmp_path,
        data={
            "name": "image_folder",
            "root": str(files / "images"),
            "num_classes": 2,
            "loader": "torchvision",
            "workers": 0,
            "augmentation": {},
        },
        teacher={"model": TEACHER, "weights": str(files / "teacher.pth"), "fidelity": {"min_agreement": 0.0}},
        distill={"method": "kd", "teacher_head": "prefit"},
        train={"global_batch_size": 4, "accumulation_steps": 1, "total_epochs": 1},
    )
    changed = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
    return build_experiment(load_config(config, changed), ALONE)


def with_student(files: Path) -> dict[str, Any]:
    return {"student.weights": str(files / "student.pth")}


def plain(files: Path, name: str, model: str) -> nn.Module:
    network = build_model(model, num_classes=2)
    network.load_state_dict(torch.load(files / f"{name}.pth"))
    return network.eval()


def normalised(levels: Tensor, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in constants)
    return ((levels / 255 - mean) / std).float()


def levels_of(images: Tensor, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Grey levels; fails if they are not whole, as they would be under other constants."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in constants)
    levels = (images.double() * std + mean) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    return levels.round()


@torch.no_grad()
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_each_network_sees_its_own_mean(files: Path, tmp_path: Path, precision: str, tolerance: float) -> None:
    """In fp32 of the order of summation, in bf16 of what a network with random weights loses."""
    built = experiment(files, tmp_path, {**with_student(files), "teacher.precision": precision})
    assert (built.splits.mean, built.splits.std) == IMAGENET
    batch = next(built.loader.train(0))
    levels = levels_of(batch.images, IMAGENET)
    assert built.teacher is not None
    expected = plain(files, "teacher", TEACHER)(normalised(levels, HALF))
    torch.testing.assert_close(built.teacher(batch.images).logits, expected, rtol=tolerance, atol=tolerance)
    wrong = plain(files, "teacher", TEACHER)(batch.images)
    assert (wrong - expected).abs().max() > 2 * tolerance
    student = plain(files, "student", STUDENT)(normalised(levels, IMAGENET))
    torch.testing.assert_close(built.student.eval()(batch.images).logits, student, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_a_student_from_scratch_sees_what_its_teacher_sees(files: Path, tmp_path: Path, loader: str) -> None:
    """Which is timm's own transform of the image; DALI may round a level apart."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    built = experiment(files, tmp_path, {"data.loader": loader})
    assert built.teacher is not None
    cfg = resolve_data_config(pretrained_cfg=plain(files, "teacher", TEACHER).pretrained_cfg)  # type: ignore[arg-type]
    assert (cfg["mean"], cfg["std"], cfg["interpolation"], cfg["crop_pct"]) == (*HALF, "bicubic", 0.95)
    transform = create_transform(**{**cfg, "input_size": (3, SIZE, SIZE)})
    paths = sorted((files / "images" / "val").rglob("*.png"))
    expected = torch.stack([transform(Image.open(path)) for path in paths])
    shown = torch.cat([batch.images for batch in built.loader.evaluate("val")])
    atol = 1e-6 if loader == "torchvision" else 2.01 / 255 / 0.5
    torch.testing.assert_close(shown, expected, rtol=0, atol=atol)
    assert torch.equal(built.teacher.renormalised(shown), shown)


def test_an_explicit_resize_wins(files: Path, tmp_path: Path) -> None:
    built = experiment(files, tmp_path, {"data.augmentation.eval_resize": SIZE})
    image = next(iter(built.loader.evaluate("val"))).images[0]
    stored = Image.open(min((files / "images" / "val").rglob("*.png")))
    resized = stored.resize((int(SIZE * stored.width / stored.height), SIZE), Image.Resampling.BICUBIC)
    left = round((resized.width - SIZE) / 2)
    assert torch.equal(levels_of(image, HALF), pil_to_tensor(resized)[:, :, left : left + SIZE].double())


def test_a_random_teacher_asks_for_nothing(files: Path, tmp_path: Path) -> None:
    built = experiment(files, tmp_path, {"teacher.weights": "random"})
    assert (built.splits.mean, built.splits.std) == IMAGENET
    assert (built.splits.interpolation, built.splits.eval_resize) == ("bilinear", None)
    assert inputs.teacher_affine(built.config, built.splits) is None


def test_a_student_alone_sees_what_its_siblings_see(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a comparison the runs without a teacher name it too; its file they do without."""
    alone = {"distill.method": "none"}
    built = experiment(files, tmp_path, alone)
    assert (built.splits.mean, built.splits.interpolation) == (HALF[0], "bicubic")
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    built = experiment(files, tmp_path, {**alone, "teacher.weights": "${NO_SUCH_VARIABLE}/teacher.pth"})
    assert (built.splits.mean, built.splits.std) == IMAGENET


def test_data_in_memory_keep_their_constants(files: Path, tmp_path: Path) -> None:
    digits = {"data.name": "digits", "data.num_classes": 10, "data.loader": "auto"}
    built = experiment(files, tmp_path, {**digits, "teacher.weights": "random"})
    weights = tmp_path / "teacher.pth"
    torch.save(build_model(TEACHER, num_classes=10).state_dict(), weights)
    again = experiment(files, tmp_path, {**digits, "teacher.weights": str(weights)})
    assert (again.splits.mean, again.splits.std) == (built.splits.mean, built.splits.std) != HALF
    assert inputs.teacher_affine(again.config, again.splits) is None


@torch.no_grad()
def test_a_teacher_trained_here_says_what_it_was_trained_on(files: Path, tmp_path: Path) -> None:
    """By its name it would be taken for one of 0.5 and bicubic."""
    weights = tmp_path / "student.safetensors"
    own = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bilinear", 0.8, False, SIZE)
    teacher = plain(files, "teacher", TEACHER)
    export_student(teacher, weights, StudentCard(TEACHER, {}, 10, None, own))
    built = experiment(files, tmp_path, {"teacher.weights": str(weights)})
    assert (built.splits.mean, built.splits.interpolation, built.splits.eval_resize) == (own.mean, "bilinear", 40)
    assert inputs.preprocessing_of(built.splits, built.loader.schedule.augmentation) == own
    built = experiment(files, tmp_path, {"teacher.weights": str(weights), **with_student(files)})
    images = next(built.loader.train(0)).images
    expected = teacher(normalised(levels_of(images, IMAGENET), (own.mean, own.std)))
    assert built.teacher is not None
    torch.testing.assert_close(built.teacher(images).logits, expected, rtol=1e-5, atol=1e-5)


def said(caplog: pytest.LogCaptureFixture, build: Any) -> list[str]:
    inputs._log_once.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="unikd_fast"):
        build()
    return [record.message for record in caplog.records if record.message.startswith("images: ")]


def test_one_line_says_what_differs(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guessed = " (its weights are a file: the default of its name)"
    assert said(caplog, lambda: experiment(files, tmp_path, with_student(files))) == [
        "images: mean 0.485/0.456/0.406, std 0.229/0.224/0.225, bilinear, short side 36 before the central crop: those "
        f"of student.model = {STUDENT}{guessed}; renormalised for the teacher to mean 0.5/0.5/0.5, std 0.5/0.5/0.5; "
        f"student.model = {STUDENT} was trained with 224 px instead of 32; teacher.model = {TEACHER} was trained with "
        "bicubic, short side 33 before the central crop, 160 px instead of 32"
    ]
    assert said(caplog, lambda: experiment(files, tmp_path, {"data.image_size": 160})) == [
        "images: mean 0.5/0.5/0.5, std 0.5/0.5/0.5, bicubic, short side 168 before the central crop: those of "
        f"teacher.model = {TEACHER}{guessed}"
    ]
    assert said(caplog, lambda: experiment(files, tmp_path, {"teacher.weights": "random"})) == []
    member = {"model": STUDENT, "weights": str(files / "student.pth"), "image_size": 128}
    several = {"teacher.ensemble": [member], "data.image_size": 160}
    assert said(caplog, lambda: experiment(files, tmp_path, several)) == [
        "images: mean 0.5/0.5/0.5, std 0.5/0.5/0.5, bicubic, short side 168 before the central crop: those of "
        f"teacher.model = {TEACHER}{guessed}; teacher.model = {STUDENT} was trained with bilinear, short side 182 "
        "before the central crop, 224 px instead of 128"
    ]


def key_of(files: Path, tmp_path: Path, changes: dict[str, Any]) -> dict[str, Any]:
    built = experiment(files, tmp_path, changes)
    network = LogitsOnly(plain(files, "teacher", TEACHER))
    key = outputs_key(built, network)
    found: dict[str, Any] = key["data"]
    return found


def test_a_cache_is_keyed_on_what_the_teacher_sees(files: Path, tmp_path: Path) -> None:
    follows, published = (key_of(files, tmp_path, changes) for changes in ({}, with_student(files)))
    assert (follows["mean"], follows["std"]) == (published["mean"], published["std"]) == (list(HALF[0]), list(HALF[1]))
    assert {name for name in follows if follows[name] != published[name]} == {"resize"}
    assert "bicubic" in follows["resize"] and "bilinear" in published["resize"]
    assert key_of(files, tmp_path, {"teacher.weights": "random"})["mean"] == list(IMAGENET[0])


def test_cached_outputs_are_those_of_its_own_images(files: Path, tmp_path: Path) -> None:
    cache = {"mode": "read_write", "dir": str(tmp_path / "cache"), "recheck": 0.5}
    built = experiment(files, tmp_path, {**with_student(files), "teacher.cache": cache})
    ready_cache(built, StopSignal(ALONE), "test")
    assert built.teacher_record is not None and built.teacher_record["recheck"] is not None
    network = plain(files, "teacher", TEACHER)
    for batch, target in built.micro_batches(0):
        assert target is not None and isinstance(target.logits, Tensor)
        with torch.no_grad():
            expected = network(normalised(levels_of(batch.images, IMAGENET), HALF))
        torch.testing.assert_close(target.logits.float(), expected, rtol=2e-3, atol=2e-3)  # stored in fp16


@torch.no_grad()
def test_the_teachers_accuracy_is_that_of_its_own_images(files: Path, tmp_path: Path) -> None:
    built = experiment(files, tmp_path, with_student(files))
    found = evaluate_teacher(built.config, tmp_path / "teacher", ALONE, task=CLASSIFICATION, label="teacher")["last"][
        "test"
    ]
    batches = list(built.loader.evaluate("val"))
    images = normalised(levels_of(torch.cat([batch.images for batch in batches]), IMAGENET), HALF)
    labels = torch.cat([batch.labels for batch in batches])
    expected = nn.functional.cross_entropy(plain(files, "teacher", TEACHER)(images), labels).item()
    assert found["ce"] == pytest.approx(expected, rel=1e-5)
