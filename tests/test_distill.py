"""distill(): a whole run from Python, with networks and data sets that are given as objects."""

import copy
import json
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import datasets, transforms
from torchvision.transforms import v2

from support.folder_images import write_images
from support.long_rounds import long
from support.ranks import Ranks
from unikd_fast import distill
from unikd_fast.config import ConfigError, parse_config
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.datasets import load_datasets, read_item
from unikd_fast.data.loader import build_loader
from unikd_fast.data.settings import DataSettings
from unikd_fast.distillation import Run
from unikd_fast.engine.run import launch
from unikd_fast.errors import DataError
from unikd_fast.export.predict import predict
from unikd_fast.models import StudentCard, build_model

CLASSES, SIZE = 3, 16
FAST: dict[str, Any] = {
    "method": "kd",
    "epochs": 1,
    "global_batch_size": 8,
    "workers": 0,
    "config": {"teacher.min_accuracy": 0},
}


class Net(nn.Module):
    """A small network of two stages."""

    def __init__(self, width: int = 4, classes: int = CLASSES) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.two(self.one(images)).mean((2, 3)))


def net(seed: int, width: int = 4, classes: int = CLASSES) -> Net:
    torch.manual_seed(seed)
    return Net(width, classes)


def tensors(count: int = 24, size: int = SIZE, seed: int = 0) -> TensorDataset:
    """Images whose class is in the mean of a channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randn(count, 3, size, size, generator=generator)
    images[:, 0] += labels[:, None, None] - 1.0
    return TensorDataset(images, labels)


class Changing(Dataset):
    """Images of random numbers from each generator that transforms use."""

    targets = tuple(i % CLASSES for i in range(24))

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = torch.rand(3, SIZE, SIZE)
        image[0] += np.random.rand()  # noqa: NPY002
        image[1] += random.random()
        return image, row % CLASSES


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_student_gets_the_weights_of_the_run(tmp_path: Path) -> None:
    teacher, student = net(0, 8), net(1)
    before, images = copy.deepcopy(teacher.state_dict()), tensors()
    run = distill(teacher, student, images, tensors(12, seed=1), **FAST)
    assert isinstance(run, Run) and run.student is student
    assert run.folder == Path("runs/kd-Net-1")
    trained = load_file(run.folder / "student.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in student.state_dict().items())
    assert not torch.equal(student.one[0].weight, net(1).one[0].weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    again = net(1)
    assert distill(teacher, again, images, tensors(12, seed=1), **FAST).folder == Path("runs/kd-Net-2")
    assert all(torch.equal(trained[name], tensor) for name, tensor in again.state_dict().items())


def test_accuracy_is_that_of_the_student_over_the_test_data() -> None:
    student, test = net(1), tensors(15, seed=2)
    run = distill(
        None, student, tensors(96), tensors(12, seed=1), test, method="none", epochs=4, global_batch_size=8, workers=0
    )
    images, labels = test.tensors
    with torch.no_grad():
        right = (student.eval()(images).argmax(1) == labels).float().mean()
    assert run.accuracy == pytest.approx(100 * right.item())
    assert json.loads((run.folder / "config.json").read_text())["train"]["total_epochs"] == 4


def test_a_warm_up_in_steps_takes_the_place_of_the_usual_one() -> None:
    def warm_up(**settings: Any) -> tuple[float, int]:
        settings |= {"method": "none", "epochs": 5, "max_steps": 1, "global_batch_size": 8, "workers": 0}
        run = distill(None, net(1), tensors(), tensors(12, seed=1), **settings)
        train = json.loads((run.folder / "config.json").read_text())["train"]
        return train["warmup_epochs"], train["warmup_steps"]

    assert (warm_up(), warm_up(warmup_steps=2)) == ((1.0, 0), (0.0, 2))


def test_files_given_as_a_data_set_train_as_an_image_folder() -> None:
    root = write_images(Path("images"), {"train": 24, "val": 9})
    raw = {
        "run": {"dir": "by-name"},
        "data": {"name": "image_folder", "root": str(root), "image_size": SIZE, "loader": "torchvision", "workers": 0},
        "teacher": {"model": "cifar/resnet8", "weights": "random"},
        "student": {"model": "cifar/resnet8"},
        "distill": {"method": "unikd", "unikd": {"head_steps": 3}},
        "train": {"total_epochs": 2, "global_batch_size": 8, "learning_rate": 0.05},
    }
    launch(parse_config(raw, name="by-name", source="test"))
    torch.manual_seed(0)
    student = build_model("cifar/resnet8", num_classes=CLASSES)
    torch.manual_seed(1)
    teacher = build_model("cifar/resnet8", num_classes=CLASSES)
    run = distill(
        teacher,
        student,
        datasets.ImageFolder(str(root / "train")),
        datasets.ImageFolder(str(root / "val")),
        epochs=2,
        image_size=SIZE,
        head_steps=3,
        global_batch_size=8,
        workers=0,
        weight_decay=0.0,
        warmup_epochs=0.0,
        augmentation={"crop": "resized", "flip_probability": 0.5},
        config={"teacher.min_accuracy": 0},
    )
    named, given = load_file("by-name/student.safetensors"), student.state_dict()
    assert all(torch.equal(named[name], given[name]) for name in named)
    card = StudentCard.read(run.folder / "student.safetensors")
    assert card is not None and card.class_names == ("class_0", "class_1", "class_2")
    assert card.preprocessing == StudentCard.read(Path("by-name/student.safetensors")).preprocessing  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_give_one_view_a_sample_and_epoch(workers: int) -> None:
    splits = load_datasets(Changing(), tensors(6), None, num_classes=CLASSES)

    def views(batch: int, epoch: int, count: int) -> dict[int, Tensor]:
        data = DataSettings(name="given", image_size=SIZE, workers=count)
        loader = build_loader(splits, data, seed=5, global_batch_size=batch, device="cpu")
        batches = list(loader.train(epoch))
        return {int(i): image for each in batches for i, image in zip(each.sample_ids, each.images, strict=True)}

    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    first = views(8, 0, workers)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert len(first) == 24 and not torch.equal(first[0], first[1])
    other = views(6, 0, 0)
    assert all(torch.equal(image, other[i]) for i, image in first.items())
    later = views(8, 1, workers)
    assert not any(torch.equal(image, later[i]) for i, image in first.items())


def test_the_cache_holds_outputs_of_random_transforms() -> None:
    cached = {**FAST["config"], "teacher.cache.mode": "read_write", "teacher.cache.recheck": 1.0}
    runs = [
        distill(net(0, 8), net(1), Changing(), tensors(6), **{**FAST, "config": config, "epochs": 2})
        for config in (FAST["config"], cached)
    ]
    online, read = (load_file(run.folder / "student.safetensors") for run in runs)
    # The cache keeps logits in fp16: 2^-11 of their size, over six steps.
    assert all(torch.allclose(online[name], read[name], atol=2e-3) for name in online)


def test_two_views_of_a_method_are_drawn_apart() -> None:
    splits = load_datasets(Changing(), tensors(6), None, num_classes=CLASSES)
    data = DataSettings(name="given", image_size=SIZE, workers=0)
    loader = build_loader(splits, data, seed=5, global_batch_size=8, device="cpu", second_view=True)
    batch = next(loader.train(0))
    assert batch.second is not None and batch.second.shape == batch.images.shape
    assert not torch.equal(batch.second, batch.images)


def test_a_finished_run_is_shown_and_another_teacher_refused() -> None:
    settings = {**FAST, "dir": "mine"}
    trained = distill(net(0, 8), net(1), tensors(), tensors(6), **settings)
    with pytest.raises(ConfigError, match=r"mine holds a finished run"):
        distill(net(0, 8), net(1), tensors(), tensors(6), **settings)
    student = net(5)
    shown = distill(net(0, 8), student, tensors(), tensors(6), **settings, resume=True)
    assert shown.result == trained.result
    assert torch.equal(student.head.weight, trained.student.head.weight)
    with pytest.raises(ConfigError, match=r"teacher.weights was 'given:.*, now 'given:"):
        distill(net(7, 8), net(1), tensors(), tensors(6), **settings, resume=True)
    with pytest.raises(ConfigError, match=r"data.digest was 'given:.*, now 'given:"):
        distill(net(0, 8), net(1), tensors(seed=9), tensors(6), **settings, resume=True)


class Stopping(Changing):
    """A data set that fails at one of its reads, which are counted."""

    def __init__(self, last: float = float("inf")) -> None:
        self.reads, self.last = 0, last

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        self.reads += 1
        if self.reads > self.last:
            raise OSError("stopped")
        return super().__getitem__(row)


def test_a_stopped_run_continues_bit_for_bit() -> None:
    settings = {**FAST, "epochs": 2, "checkpoint_every_steps": 1}
    counted = Stopping()
    whole = distill(net(0, 8), net(1), counted, tensors(6), **settings).student
    with pytest.raises(DataError, match=r"cannot be read .OSError: stopped"):
        distill(net(0, 8), net(1), Stopping(counted.reads - 12), tensors(6), **settings, dir="stopped")
    continued = net(5)  # of other weights, in whose place come those of the checkpoint
    distill(net(0, 8), continued, Changing(), tensors(6), **settings, dir="stopped", resume=True)
    assert (Path("stopped") / "starts.jsonl").read_text().count("\n") == 1
    ours, theirs = whole.state_dict(), continued.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _two_processes() -> int:
    student = net(1 + int(os.environ["RANK"]))  # of different weights, of which the first process's count
    run = distill(net(0, 8), student, tensors(), tensors(6), **FAST, dir="two")
    torch.save((run.accuracy, student.state_dict()), f"rank-{os.environ['RANK']}.pt")
    return 0


@pytest.mark.long
def test_two_processes_train_one_student(tmp_path: Path) -> None:
    done = Ranks(_two_processes, tmp_path, processes=2).done()
    assert done.returncode == 0, done.stderr
    (first, weights), (second, others) = (torch.load(f"rank-{rank}.pt") for rank in (0, 1))
    assert first == second and all(torch.equal(weights[name], others[name]) for name in weights)
    alone = net(1)
    distill(net(0, 8), alone, tensors(), tensors(6), **FAST)
    # Gradients are averaged over two halves of a batch, and each process has its own BatchNorm statistics.
    assert torch.allclose(alone.head.weight, weights["head.weight"], atol=0.02)
    assert not torch.equal(alone.head.weight, net(1).head.weight)


def test_report_and_export(capsys: pytest.CaptureFixture[str]) -> None:
    root = write_images(Path("images"), {"train": 24, "val": 9})
    train, val = (datasets.ImageFolder(str(root / part)) for part in ("train", "val"))
    run = distill(net(0, 8), net(1), train, val, **FAST, image_size=SIZE)
    page = run.report().read_text()
    assert "test_distill:Net" in page or "Net" in page
    exported = run.export("student.onnx")
    image = next((root / "val").rglob("*.png"))
    (found,) = predict(exported, [image])
    (whole,) = predict(run.export("whole.onnx", preprocess=True), [image])
    assert whole.classes[0] == found.classes[0]
    assert set(found.classes) == {"class_0", "class_1", "class_2"}
    with pytest.raises(ConfigError, match=r"passed to unikd_fast.distill, and no file holds it"):
        next(predict(run.folder, [image]))


def test_own_transforms_are_told_to_users_of_the_student() -> None:
    root = write_images(Path("images"), {"train": 24, "val": 9})
    steps = [transforms.Resize(20), transforms.CenterCrop(SIZE), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    train, val = (datasets.ImageFolder(str(root / part), transforms.Compose(steps)) for part in ("train", "val"))
    run = distill(net(0, 8), net(1), train, val, **FAST)
    card = StudentCard.read(run.folder / "student.safetensors")
    assert card is not None
    assert (card.preprocessing.mean, card.preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert card.preprocessing.short_side(SIZE) == 20
    image = next((root / "val" / "class_1").rglob("*.png"))
    position = [Path(path) for path, _ in val.samples].index(image)
    with torch.no_grad():
        expected = run.student.eval()(val[position][0][None]).softmax(1).max()
    (found,) = predict(run.export("student.onnx"), [image], top=1)
    assert found.probabilities[0] == pytest.approx(expected.item(), abs=1e-5)  # of fp32 in another order


def test_unknown_transforms_leave_the_card_out(caplog: pytest.LogCaptureFixture) -> None:
    run = distill(net(0, 8), net(1), tensors(), tensors(6), **FAST)
    assert StudentCard.read(run.folder / "student.safetensors") is None
    assert "exports will not say how images are preprocessed" in caplog.text


RESIZE, CROP, TENSOR = transforms.Resize(20), transforms.CenterCrop(SIZE), transforms.ToTensor()


@pytest.mark.parametrize(
    ("steps", "resized"),
    [
        ([v2.ToImage(), v2.Resize(20), v2.CenterCrop(SIZE), v2.ToDtype(torch.float32, scale=True)], 20),
        ([v2.ToImage(), v2.Resize((SIZE, SIZE)), v2.ToDtype(torch.float32)], None),
        ([CROP, TENSOR], None),
        ([transforms.CenterCrop(20), transforms.Resize(SIZE), TENSOR], None),
        ([transforms.Resize(20, max_size=40), CROP, TENSOR], None),
        ([RESIZE, CROP, TENSOR, transforms.GaussianBlur(3)], None),
    ],
    ids=["v2", "levels of 0 to 255", "crop alone", "crop before resize", "largest side", "another step"],
)
def test_only_known_transforms_are_told(steps: list[Any], resized: int | None) -> None:
    root = write_images(Path("images"), {"val": 6})
    val = datasets.ImageFolder(str(root / "val"), transforms.Compose(steps))
    splits = load_datasets(val, val, None, num_classes=CLASSES)
    assert splits.is_described == (resized is not None)
    assert resized is None or splits.eval_resize == resized


def test_a_timm_teacher_sees_its_own_mean_and_deviation() -> None:
    root = write_images(Path("images"), {"train": 24, "val": 9}, fixed_size=32)
    train, val = (datasets.ImageFolder(str(root / part)) for part in ("train", "val"))
    import timm

    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    assert tuple(teacher.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    run = distill(teacher, net(1), train, val, **FAST)
    card = StudentCard.read(run.folder / "student.safetensors")
    assert card is not None and card.preprocessing.mean == (0.5, 0.5, 0.5) and card.preprocessing.image_size == 32


def test_several_teachers_teach_their_mean() -> None:
    class Constant(Net):
        """A network whose logits are the same for all images."""

        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits))

        def forward(self, images: Tensor) -> Tensor:
            return 0 * super().forward(images) + self.logits

    first, second = Constant([4.0, 0.0, 0.0]), Constant([0.0, 8.0, 0.0])
    runs = [
        distill(teacher, net(1), tensors(), tensors(6), **FAST, teacher_weights=weights)
        for teacher, weights in (([first, second], [3, 1]), (Constant([3.0, 2.0, 0.0]), None))
    ]
    together, alone = (run.student.state_dict() for run in runs)
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert len(json.loads((runs[0].folder / "config.json").read_text())["teacher"]["ensemble"]) == 1


def test_a_network_may_see_smaller_images() -> None:
    class Fixed(Net):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape[-1] == 8, f"made for 8 pixels, got {images.shape[-1]}"
            return super().forward(images)

    torch.manual_seed(0)
    config = {**FAST["config"], "teacher.image_size": 8}
    run = distill(Fixed(8), net(1), tensors(), tensors(6), **{**FAST, "config": config})
    assert run.result["steps"] == 3
    with pytest.raises(ConfigError, match=r"teacher.* does not take images of 16x16 .*set teacher.image_size"):
        distill(Fixed(8), net(1), tensors(), tensors(6), **FAST)


class Labelled(Dataset):
    """A data set without a list of its labels."""

    def __init__(self, labels: Any, image: Any = None) -> None:
        self._labels, self._image = labels, torch.zeros(3, SIZE, SIZE) if image is None else image

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> Any:
        return self._image, self._labels[row]


class Folder(Labelled):
    """A data set whose list of labels is not that of its items."""

    def __init__(self, labels: list[int], target_transform: Callable[[int], int] | None) -> None:
        super().__init__([label if target_transform is None else target_transform(label) for label in labels])
        self.targets, self.target_transform = labels, target_transform


class Named(Labelled):
    """A data set whose list of labels has the names of classes, and its items their numbers."""

    labels = ("dog", "cat", "cow")


class Damaged(Changing):
    """A data set of which one item cannot be read."""

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if row == 7:
            raise OSError("cut off")
        return super().__getitem__(row)


def test_items_that_cannot_be_read_are_skipped_if_asked() -> None:
    with pytest.raises(DataError, match=r"item 7 of the train data set cannot be read .OSError: cut off.; correct it"):
        distill(net(0, 8), net(1), Damaged(), tensors(6), **FAST)
    run = distill(net(0, 8), net(1), Damaged(), tensors(6), **FAST, bad_images="skip", max_bad_share=0.1)
    assert run.result["steps"] == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_item_without_known_label_is_named(workers: int) -> None:
    train = Damaged()
    train.targets = ()  # of another number
    with pytest.raises(ConfigError, match=r"item 7 of the train data set cannot be read .OSError: cut off.; correct"):
        distill(net(0, 8), net(1), train, tensors(6), **{**FAST, "workers": workers})


def test_levels_of_16_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((SIZE, SIZE), 0x4321, np.uint16))
    splits = load_datasets(Labelled([0], grey), Labelled([0], grey), None, num_classes=1)
    image = read_item(splits.train.dataset, splits.train.images([0])[0])  # type: ignore[union-attr]
    assert isinstance(image, Image.Image) and image.getpixel((0, 0)) == (0x43, 0x43, 0x43)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Labelled([2, 0, 1]), [2, 0, 1]),
        (Labelled([torch.tensor(2), np.int64(0), 1.0]), [2, 0, 1]),
        (Folder([1, 2, 3], lambda label: label - 1), [0, 1, 2]),
        (Subset(Folder([0, 1, 2], None), [2, 0]), [2, 0]),
        (ConcatDataset([Folder([0, 1], None), Labelled([2])]), [0, 1, 2]),
        (tensors(4), [0, 1, 2, 0]),
        (Named([2, 0, 1]), [2, 0, 1]),
    ],
    ids=["items", "scalars", "target transform", "subset", "concatenation", "tensors", "names"],
)
def test_labels_are_found(dataset: Any, expected: list[int]) -> None:
    splits = load_datasets(dataset, tensors(3), None, num_classes=CLASSES)
    assert splits.train.labels.tolist() == expected


def test_a_hugging_face_data_set() -> None:
    from datasets import ClassLabel, Features
    from datasets import Dataset as Table
    from datasets import Image as ImageFeature

    pixels = [Image.fromarray(np.full((SIZE, SIZE, 3), i * 20, np.uint8)) for i in range(9)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    table = Table.from_dict({"image": pixels, "label": [i % 3 for i in range(9)]}, features=features)
    splits = load_datasets(table, table, None, num_classes=3)
    assert splits.class_names == ("a", "b", "c") and splits.train.labels.tolist() == [0, 1, 2] * 3
    data = DataSettings(name="given", image_size=SIZE, workers=0, augmentation=Augmentation(crop="none"))
    batch = next(build_loader(splits, data, seed=0, global_batch_size=9, device="cpu").evaluate("val"))
    assert torch.allclose(batch.images[:, 0].mean((1, 2)) * 0.229 + 0.485, torch.arange(9) * 20 / 255, atol=1e-6)


def test_a_loader_gives_its_batch_size_and_workers() -> None:
    train, val = DataLoader(tensors(), batch_size=4, shuffle=True, num_workers=0), DataLoader(tensors(6), batch_size=3)
    settings = {key: value for key, value in FAST.items() if key not in ("global_batch_size", "workers")}
    run = distill(net(0, 8), net(1), train, val, **settings)
    config = json.loads((run.folder / "config.json").read_text())
    assert config["train"]["global_batch_size"] == 4 and config["data"]["workers"] == 0


def test_it_runs_outside_the_main_thread() -> None:
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(distill(net(0, 8), net(1), tensors(), tensors(6), **FAST)))
    thread.start()
    thread.join()
    assert runs and runs[0].result["steps"] == 3


def test_runs_in_threads_come_one_after_the_other() -> None:
    steps: dict[int, int] = {}

    def train(epochs: int) -> None:
        settings = {**FAST, "epochs": epochs, "dir": f"run-{epochs}"}
        steps[epochs] = distill(net(epochs, 8), net(9), tensors(), tensors(6), **settings).result["steps"]

    threads = [threading.Thread(target=train, args=(epochs,)) for epochs in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps == {1: 3, 3: 9}


@contextmanager
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting",
    [long(torch.no_grad), torch.inference_mode, long(lambda: torch.autocast("cpu", torch.bfloat16)), long(doubles)],
    ids=["no grad", "inference", "autocast", "float64"],
)
def test_settings_of_the_caller_neither_count_nor_change(setting: Any) -> None:
    data, students = (Changing(), tensors(6)), [net(1), net(1)]
    distill(net(0, 8), students[0], *data, **FAST)
    teacher, threads = net(0, 8), torch.get_num_threads()
    with setting():
        before = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled(), torch.get_default_dtype()
        distill(teacher, students[1], *data, **FAST)
        after = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled(), torch.get_default_dtype()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:] and torch.get_num_threads() == threads
    ours, theirs = (student.state_dict() for student in students)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_log_of_the_caller_shows_messages_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler, logger = logging.StreamHandler(), logging.getLogger("unikd_fast")
    kept, logger.handlers = logger.handlers, []
    logging.getLogger().addHandler(handler)
    try:
        distill(net(0, 8), net(1), tensors(), tensors(6), **FAST)
    finally:
        logging.getLogger().removeHandler(handler)
        logger.handlers = kept
    assert capsys.readouterr().err.count("the teacher's accuracy is low") == 1


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(tensors())


def dictionaries(keys: tuple[str, str]) -> Dataset:
    class Items(Labelled):
        def __getitem__(self, row: int) -> Any:
            return dict(zip(keys, super().__getitem__(row), strict=True))

    return Items([0, 1, 2])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (Endless(), "train data set is a Endless, which cannot be indexed; .*Distiller in a loop"),
        (DataLoader(Endless()), "train data set is a Endless, which cannot be indexed"),
        ("images/train", "train data set is a str; give a torch.utils.data.Dataset"),
        (tensors().tensors, "train data set is a tuple; give a torch.utils.data.Dataset .*TensorDataset"),
        (Subset(tensors(), []), "train data set, a Subset, is empty"),
        (Labelled([1, 2, 3]), "labels of the train data set are 1 to 3, .* 3 classes, 0 to 2; subtract 1"),
        (Labelled([0, 1, 7]), "labels of the train data set are 0 to 7, .* 3 classes, 0 to 2; number them so"),
        (Labelled([0, -1, 2]), "labels of the train data set are -1 to 2"),
        (Labelled(["cat", "dog"]), "a label is 'cat'; it must be one whole number a sample"),
        (Labelled([torch.eye(3)[0]] * 3), r"a label is a Tensor \(3,\); it must be one whole number"),
        (Labelled([0.5, 1, 2]), "a label is 0.5; it must be one whole number"),
        (Labelled([0, 1, 2], torch.zeros(1, SIZE, SIZE)), r"tensor \(1, 16, 16\); it must be \(3, H, W\), .*expand"),
        (Labelled([0, 1, 2], torch.zeros(3, 8, SIZE)), r"\(3, 8, 16\); networks are given square images"),
        (Labelled([0, 1, 2], "a.png"), "its image is a str; it must be a PIL image"),
        (Labelled([0, 1, 2], torch.zeros(3, 4, 4, dtype=torch.int64)), "tensor of torch.int64; it must be uint8"),
        (Labelled([0, 1, 2], torch.zeros(3, 8, 8)), "images are train 8 x 8, val 16 x 16"),
        (Labelled([0, 1, 2], Image.new("RGB", (8, 8))), "train data set are images .* of val float tensors"),
        (dictionaries(("picture", "label")), "it has the keys picture, label; an item must have an image"),
        (DataLoader(tensors(), collate_fn=list), "DataLoader of train has a collate_fn of its own"),
        (
            DataLoader(tensors(), sampler=WeightedRandomSampler([1.0] * 24, 24)),
            "DataLoader of train has a WeightedRandomSampler, and distill shuffles by itself",
        ),
    ],
)
def test_unusable_data_is_refused(train: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(net(0, 8), net(1), train, tensors(6), **FAST)
    assert not Path("runs").exists()


def same(student: nn.Module, other: nn.Module) -> bool:
    ours, theirs = student.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def trained(teacher: nn.Module, student: nn.Module) -> nn.Module:
    return distill(teacher, student, tensors(), tensors(6), **FAST).student


def test_wrapped_networks_train_as_what_they_wrap() -> None:
    student = torch.compile(nn.DataParallel(net(1)), backend="eager")
    run = distill(nn.DataParallel(net(0, 8)), student, tensors(), tensors(6), **{**FAST, "method": "at"})
    plain = net(1)
    distill(net(0, 8), plain, tensors(), tensors(6), **{**FAST, "method": "at"})
    assert run.student is student and same(plain, student._orig_mod.module)
    assert load_file(run.folder / "student.safetensors").keys() == plain.state_dict().keys()


@pytest.mark.long
def test_networks_of_other_precisions_train_in_fp32() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        student, plain = net(1).to(dtype), net(1).to(dtype).float()
        teacher = net(0, 8).to(dtype)
        assert same(trained(teacher, student), trained(copy.deepcopy(teacher).float(), plain).to(dtype))
        assert student.head.weight.dtype == dtype == teacher.head.weight.dtype


def test_imaginary_parts_of_a_network_are_kept() -> None:
    class Wave(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("wave", torch.tensor([1 + 2j]))

        def forward(self, images: Tensor) -> Tensor:
            assert self.wave.is_complex()
            return super().forward(images) * self.wave.imag

    torch.manual_seed(1)
    assert trained(net(0, 8), Wave()).wave.tolist() == [1 + 2j]


def test_a_frozen_copy_of_the_student_may_teach() -> None:
    student = net(1)
    trained(copy.deepcopy(student).requires_grad_(False), student)
    assert not torch.equal(student.head.weight, net(1).head.weight)


def test_a_teacher_of_tuples_teaches_as_one_of_logits() -> None:
    class Auxiliary(Net):
        def forward(self, images: Tensor) -> Any:
            logits = super().forward(images)
            return logits, 2 * logits

    torch.manual_seed(0)
    assert same(trained(Auxiliary(8), net(1)), trained(net(0, 8), net(1)))


def changed(student: nn.Module, **members: Any) -> nn.Module:
    for name, value in members.items():
        setattr(student, name, value)
    return student


class Stateful(Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}


class TwoHeads(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"scores": images.mean((2, 3))}


@pytest.mark.parametrize(
    ("networks", "settings", "message"),
    [
        ((None, net(1)), {}, "method = 'kd' without a teacher"),
        (("timm/resnet18", net(1)), {}, "the teacher is a str; give a torch.nn.Module"),
        ((net(0, 8, 4), net(1)), {}, "the student has 3 classes and the teacher 4; fine-tune the teacher"),
        ((nn.Conv2d(3, 3, 1), net(1)), {}, r"the teacher must return logits \(N, K\), got \(2, 3, 16, 16\)"),
        ((TwoHeads(), net(1)), {}, r"the teacher: TwoHeads returns dict with \['scores'\], which has no logits"),
        ((lambda images: images, net(1)), {}, "the teacher is a function; give a torch.nn.Module"),
        ((net(0, 8), net(1).requires_grad_(False)), {}, "the student, a Net, has no parameter with requires_grad"),
        ((net(0, 8), net(1).to("meta")), {}, "the student's one.0.weight is on the device meta, without data"),
        ((net(0, 8), changed(net(1), lock=threading.Lock())), {}, "the student, a Net, cannot be copied .*keep locks"),
        ((net(0, 8), Stateful()), {}, "the student's state dict has _extra_state, a dict"),
        ((nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), net(1)), {}, "the teacher does not take images of 16x16"),
        ((net(0, 8), net(1)), {"learning_rat": 1.0}, "no setting 'learning_rat'; nearest: learning_rate"),
        ((net(0, 8), net(1)), {"lr": 1.0}, r"no setting 'lr'; nearest: learning_rate"),
        ((net(0, 8), net(1)), {"epoch": 1}, r"no setting 'epoch'; nearest: epochs"),
        ((net(0, 8), net(1)), {"total_epochs": 3}, "total_epochs = 3: distill calls it epochs"),
        ((net(0, 8), net(1)), {"num_classes": 3}, "distill takes it from the networks and data sets"),
        ((net(0, 8), net(1)), {"temperature": -1.0}, "temperature"),
        ((net(0, 8), net(1)), {"method": "kdd"}, "kdd"),
        ((net(0, 8), net(1)), {"method": ["kd", "at"], "temperature": 2.0}, "kd={'temperature': ...}"),
        (([], net(1)), {}, r"method = 'kd' without a teacher"),
        (([net(0, 8), net(0, 8, 4)], net(1)), {}, r"the student has 3 classes and the teacher 4"),
        ((net(0, 8), net(1)), {"teacher_weights": [1.0]}, r"teacher_weights has 1 numbers for 1 teachers"),
        ((net(0, 8), net(1)), {"resume": True}, "resume = True without dir"),
        ((net(0, 8), net(1)), {"feature_nodes": {"pupil": ["one"]}}, "feature_nodes has 'pupil'"),
        ((net(0, 8), net(1)), {"augmentation": {"crop": "pad"}}, "augmentation = .* float tensors; leave it out"),
        ((net(0, 8), net(1)), {"config": {"compare": {"seeds": [0], "runs": {"a": {}}}}}, "call distill once for each"),
        ((net(0, 8), net(1)), {"config": {"teacher.presision": "fp32"}}, "teacher.presision"),
        ((net(0, 8), net(1)), {"config": {"student.weights": "random"}}, "student.weights = 'random', which the arg"),
        ((net(0, 8), net(1)), {"config": {"run.dir": "mine"}}, "run.dir = 'mine', which the arguments of distill"),
        ((net(0, 8), net(1)), {"config": {"teacher": {"precision": "fp32"}}}, "replace the whole section; name each"),
        ((net(0, 8), net(1)), {"config": ["bf16"]}, r"config = \['bf16'\]; give a dictionary by keys"),
        ((net(0, 8), net(1)), {"method": nn.KLDivLoss()}, r"method = KLDivLoss\(\); give the name of a method"),
        ((net(0, 8), net(1)), {"epochs": "3"}, "epochs = '3'; give a whole number"),
        ((net(0, 8), net(1)), {"image_size": 8}, r"image_size = 8 with images .* make \(3, 16, 16\); leave it out"),
        ((net(0, 8), net(1)), {"feature_nodes": {"student": "one"}}, "give a list of names for each network"),
        ((None, net(1)), {"method": "none", "teacher_weights": [1]}, "teacher_weights has 1 numbers for 1 teachers"),
    ],
)
def test_unusable_arguments_are_refused(networks: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(*networks, tensors(), tensors(6), **{**FAST, **settings})
    assert not Path("runs").exists()


def test_a_configuration_of_objects_is_refused_elsewhere() -> None:
    run = distill(net(0, 8), net(1), tensors(), tensors(6), **FAST)
    raw = json.loads((run.folder / "config.json").read_text())
    raw["run"]["dir"] = "again"
    with pytest.raises(ConfigError, match=r"data.digest = 'given:.*passed to unikd_fast.distill"):
        launch(parse_config(raw, name="again", source="test"))


def test_an_item_that_changes_its_label_is_named() -> None:
    class Turning(Labelled):
        reads = 0

        def __getitem__(self, row: int) -> Any:
            image, label = super().__getitem__(row)
            self.reads += 1
            return image, label if self.reads < 60 else (label + 1) % CLASSES

    with pytest.raises(DataError, match=r"item \d+ of the train data set has the label \d, and had \d before"):
        distill(net(0, 8), net(1), Turning([0, 1, 2] * 8), tensors(6), **{**FAST, "epochs": 9})
