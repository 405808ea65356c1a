"""The dry run's estimate of memory, against numbers computed by hand: banks, stepping stones, copies of weights."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.build_method import build
from support.real_runs import ALONE, opened, write_config
from unikd_fast.engine.classification import CLASSIFICATION
from unikd_fast.engine.describe import describe
from unikd_fast.engine.memory import estimate_memory, saved_bytes, saved_bytes_of
from unikd_fast.engine.networks import StudentModule
from unikd_fast.methods import CRD, FLG, KD, Blockwise, Hybrid
from unikd_fast.values import Features

CPU = torch.device("cpu")
SHAPES = [(2, 4, 4), (3, 2, 2)]
CLASSES = 5


def crd(samples: int = 100, width: int = 8, negatives: int = 10) -> CRD:
    ids = torch.arange(samples)
    return build(CRD, 4, 6, ids, ids % CLASSES, CLASSES, width=width, negatives=negatives)


def test_the_banks_of_crd() -> None:
    banks = 2 * 100 * 8 * 4
    assert crd().device_bytes(3) == banks + 3 * (16 * 100 + 96 * 10)
    row = 16 * 100 + 96 * 2**18
    assert crd(negatives=2**18).device_bytes(64) == banks + 21 * row  # half a GiB, and no more rows at once
    assert 21 * row < 2**29 < 22 * row
    published = crd(50_000, 128, 16384)
    assert published.device_bytes(64) == 51_200_000 + 64 * (16 * 50_000 + 96 * 16384)
    assert build(Hybrid, {"kd": build(KD), "crd": crd()}).device_bytes(3) == crd().device_bytes(3)
    assert build(KD).device_bytes(64) == 0


def test_a_copy_of_the_classifier_counts() -> None:
    assert build(FLG, 3, 8, torch.zeros(CLASSES, 8)).device_bytes(64) == CLASSES * 8 * 4


HEADS = {"image_size": 16, "num_classes": 200}


@pytest.mark.parametrize(
    ("teacher_head", "fdp"), [("prefit", "projected"), ("anchored", "direct"), ("literal", "auto")]
)
def test_the_teachers_head_and_its_optimiser_count(tmp_path: Path, teacher_head: str, fdp: str) -> None:
    distill = {"teacher_head": teacher_head, "fdp": fdp, "fusion": "last", "norm": None, "width": 24}
    path = write_config(tmp_path, data=HEADS, student={"model": "cifar/resnet8"}, distill=distill)
    experiment = opened(path)
    expander = 24 * (64 + 1)  # a level of 64 channels
    layers = 2 * 200 * 25 if fdp == "direct" else 200 * 25 + 2 * 200 * 201
    head, student = expander + 2 * 24 + layers, sum(p.numel() for p in experiment.student.parameters())
    parts = estimate_memory(experiment, 8)
    own = head + expander  # the student's adapter, too
    if teacher_head == "literal":  # by the student's optimiser
        assert "the teacher's head and its optimiser" not in parts
        assert parts["parameters and gradients"] == 2 * 4 * (student + own)
    else:
        assert parts["the teacher's head and its optimiser"] == (1 + 1 + 2) * 4 * head
        assert parts["parameters and gradients"] == 2 * 4 * (student + expander)
    assert f"unikd: {own:,} parameters beside the student's" in describe(experiment.config, ALONE)


class Student(nn.Module):
    """Two levels of an image, each times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Features:
        level = self.weight * images
        return Features((level[:, :2], level[:, :, :2, :2]), level.flatten(1)[:, :CLASSES])


def stones_experiment(*, light: bool = False) -> Any:
    """Of a teacher of two blocks that keep what tanh gives, and a matrix that is no parameter."""
    matrix = torch.ones(12, CLASSES)
    blocks = [
        lambda level: level[:, :1].tanh()[..., ::2, ::2].expand(-1, 3, -1, -1),  # keeps (N, 1, 4, 4)
        lambda level: level.tanh().flatten(1) @ matrix,  # keeps (N, 3, 2, 2) and the matrix
    ]
    method = build(Blockwise, SHAPES, SHAPES, blocks, light=light)
    config = SimpleNamespace(data=SimpleNamespace(image_size=4), train=SimpleNamespace(precision="fp32"))
    student_module = StudentModule(Student(), method.adapter, None)
    parts = {"config": config, "student_module": student_module, "method": method, "teacher": None}
    return SimpleNamespace(**parts, task=CLASSIFICATION)


@pytest.mark.parametrize("batch", [1, 8])
def test_blockwise_stepping_stones(batch: int) -> None:
    # The first stone passes both blocks, the second one the last.
    matrix, first, second = 12 * CLASSES * 4, 1 * 4 * 4 * 4, 3 * 2 * 2 * 4
    found = saved_bytes(stones_experiment(), batch, CPU)
    assert found.inside == matrix + batch * (first + 2 * second)
    assert saved_bytes(stones_experiment(light=True), batch, CPU).inside == matrix + batch * second
    hybrid = stones_experiment()
    hybrid.method = build(Hybrid, {"kd": build(KD), "blockwise": hybrid.method})
    hybrid.student_module = StudentModule(Student(), hybrid.method.adapter, None)
    assert saved_bytes(hybrid, batch, CPU).inside == found.inside
    alone = stones_experiment()
    alone.method = build(KD)
    assert saved_bytes(alone, batch, CPU) == (found.student, 0)


BLOCKWISE = {
    "data": {"image_size": 16},
    "student": {"model": "cifar/resnet8"},
    "distill": {"method": "blockwise", "teacher_head": "prefit"},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_is_what_it_measures(tmp_path: Path, precision: str) -> None:
    """Copies of the weights, which autocast makes, count once and not for each image."""
    experiment = opened(write_config(tmp_path, **BLOCKWISE, train={"precision": precision}))
    assert saved_bytes(experiment, 12, CPU) == saved_bytes_of(experiment, 12, CPU)
    one, none = (saved_bytes(experiment, images, CPU) for images in (1, 0))
    weights = sum(parameter.numel() for parameter in experiment.student.parameters() if parameter.dim() > 1)
    assert 2 * weights * (precision == "bf16") <= none.student < one.student


def test_measuring_keeps_nothing(tmp_path: Path) -> None:
    experiment = opened(write_config(tmp_path))
    weights = [weakref.ref(parameter) for parameter in experiment.student_module.parameters()]
    assert saved_bytes_of(experiment, 2, CPU).student > 0
    del experiment
    gc.collect()
    assert weights and not any(weight() is not None for weight in weights)


def test_the_dry_run_names_what_a_method_holds(tmp_path: Path) -> None:
    experiment = opened(write_config(tmp_path, **BLOCKWISE))
    parts = estimate_memory(experiment, 8)
    assert parts["activations inside the method"] == saved_bytes_of(experiment, 8, CPU).inside > 0
    assert "the method's own" not in parts
    config = {**BLOCKWISE, "distill": {"method": "crd", "crd": {"width": 2**16}}}
    path = write_config(tmp_path, name="crd", **config)
    assert estimate_memory(opened(path), 8)["the method's own"] == 2 * 96 * 2**16 * 4 + 8 * (16 * 96 + 96 * 16384)
    text = describe(opened(path).config, ALONE)
    assert "the method's own 60, " in text  # MiB: 48 of banks and 12.01 of a step
