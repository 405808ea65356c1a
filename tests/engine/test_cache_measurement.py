"""What a plan measures: times of teacher and student, which change nothing of the run."""

import copy
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.build_method import build
from support.cache_plans import GIB, MIB, SIZES
from unikd_fast.config.schema import TrainConfig
from unikd_fast.engine import cache_plan
from unikd_fast.engine.cache_plan import CachePlan, CacheSizes, StepTimes, measure_times, plan_cache
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.networks import StudentModule
from unikd_fast.methods import KD, Method, UniKD
from unikd_fast.models import LogitsOnly, build_model, extract_features
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.values import Batch, Features, Loss, Target


def run_parts(method: str, model: str, **settings: Any) -> tuple[StudentModule, Method, nn.Module]:
    """A student's side with a method and a teacher, all with weights of their own."""
    torch.manual_seed(0)
    teacher, student = (build_model(name, num_classes=10) for name in ("cifar/resnet8", model))
    if method == "kd":
        return StudentModule(LogitsOnly(student), None, None), build(KD), LogitsOnly(teacher).eval()
    levels = [extract_features(network, image_size=32) for network in (student, teacher)]
    unikd = build(UniKD, *([shape[0] for shape in each.level_shapes] for each in levels), 10, head_steps=1, **settings)
    return StudentModule(levels[0], unikd.adapter, None), unikd, levels[1].eval()


def snapshot(*modules: nn.Module) -> list[Any]:
    """Every number of these modules, every gradient, and every module's mode."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    gradients = [p.grad for module in modules for p in module.parameters()]
    modes = [part.training for module in modules for part in module.modules()]
    asked = [p.requires_grad for module in modules for p in module.parameters()]
    return copy.deepcopy([tensors, gradients, modes, asked])


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@pytest.mark.parametrize(
    ("method", "model", "precision", "fitted"),
    [
        ("kd", "torchvision/mobilenet_v3_small", "fp32", False),  # with dropout
        ("unikd", "torchvision/mobilenet_v3_small", "bf16", True),
        ("unikd", "cifar/resnet8", "fp32", False),
    ],
)
def test_measuring_does_not_change_the_run(method: str, model: str, precision: str, fitted: bool) -> None:
    side, of_run, teacher = run_parts(method, model)
    images = torch.randn(8, 3, 32, 32)
    batch = Batch(images, torch.arange(8), torch.arange(8))
    with torch.no_grad():
        features: Features = teacher(images)
    if fitted:
        of_run.prepare(itertools.repeat(features))
    elif of_run.fitted_head is not None:
        of_run.fitted_head.eval()  # as the plan does: this is about the student's side
    side.train()
    side(images).logits.sum().backward()  # gradients of the run, which are its own as well
    side.network.eval()
    train = TrainConfig(total_epochs=1, global_batch_size=8, learning_rate=1.0, weight_decay=0.1, precision=precision)
    modules = [side, teacher] if of_run.fitted_head is None else [side, teacher, of_run.fitted_head]
    before = snapshot(*modules), copy.deepcopy(of_run.state_dict()), torch.get_rng_state(), images.clone()

    targets: list[Target] = []

    @torch.no_grad()
    def target() -> Target:
        targets.append(of_run.target(features))
        return targets[-1]

    found = measure_times(side, of_run, train, batch, target(), target, seconds=0.0)
    after = snapshot(*modules), of_run.state_dict(), torch.get_rng_state(), images
    assert equal(before, after)
    assert found.teacher > 0 and found.student > 0
    assert len(targets) == 1 + 2 + 1, "one for the student, two rounds of warm-up, and one that is timed"


class Bias(nn.Module):
    """Trains three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> Features:
        return Features((), images.mean((2, 3)) + self.bias)


def test_times_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: the teacher takes 3 s, the student 5 s, and the fourth call of each 1000 s."""
    now, calls = 0.0, {"teacher": 0, "student": 0}
    monkeypatch.setattr(cache_plan.time, "perf_counter", lambda: now)

    def pass_time(name: str, seconds: float) -> None:
        nonlocal now
        calls[name] += 1
        now += 1000.0 if calls[name] == 4 else seconds

    class Clocked(KD):
        def loss(self, *arguments: Any) -> Loss:
            pass_time("student", 5.0)
            return super().loss(*arguments)

    def teacher() -> None:
        pass_time("teacher", 3.0)

    side = StudentModule(Bias(), None, None)
    batch = Batch(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), torch.arange(4))
    train = TrainConfig(total_epochs=1, global_batch_size=4, learning_rate=0.1)
    target = Target(torch.zeros(4, 3))
    found = measure_times(side, build(Clocked), train, batch, target, teacher, seconds=10_000.0)
    assert found == StepTimes(teacher=3.0, student=5.0)
    assert calls == {"teacher": 2 + 9, "student": 2 + 9}, "with two rounds of warm-up"


ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class OneBatch:
    """A loader of 10 micro-batches of 8 images of 8 pixels, all the same."""

    def __init__(self, size: int = 8, pixels: int = 8) -> None:
        self.schedule = SimpleNamespace(micro_batch_size=size)
        self.steps_per_epoch = 5
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, 3, pixels, pixels, generator=generator)
        self.batch = Batch(images, torch.arange(size) % 3, torch.arange(size))

    def train(self, epoch: int) -> Iterator[Batch]:
        return itertools.repeat(self.batch)


def plan(side: nn.Module, method: Method, teacher: OnlineTeacher, loader: OneBatch, sizes: CacheSizes) -> CachePlan:
    train = TrainConfig(total_epochs=4, global_batch_size=16, accumulation_steps=2, learning_rate=0.1)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=train),
        processes=ALONE,
        loader=loader,
        student_module=side,
        method=method,
        epochs=4,
    )
    return plan_cache(run, teacher, sizes)


@pytest.mark.parametrize("at_a_time", [None, 8, 64, 100, 3, 1])
def test_the_teacher_is_timed_without_padding(monkeypatch: pytest.MonkeyPatch, at_a_time: int | None) -> None:
    """By a clock of our own: 10 ms an image, padded or not, so 64 take 0.64 s, and a micro-batch of 8 takes 0.08 s."""
    now, seen = 0.0, []
    monkeypatch.setattr(cache_plan.time, "perf_counter", lambda: now)

    class Slow(Bias):
        def forward(self, images: Tensor) -> Features:
            nonlocal now
            now += 0.01 * len(images)
            seen.append(images)
            return super().forward(images)

    class Clocked(KD):
        def loss(self, *arguments: Any) -> Loss:
            nonlocal now
            now += 0.02
            return super().loss(*arguments)

    loader = OneBatch()
    teacher = OnlineTeacher(Slow(), precision="fp32", fold=False, channels_last=False, batch_size=at_a_time)
    sizes = CacheSizes(samples=1000, views=4, view_bytes=MIB, missing_bytes=2 * MIB, free_bytes=GIB)
    found = plan(StudentModule(Bias(), None, None), build(Clocked), teacher, loader, sizes)
    assert found.times.teacher == pytest.approx(0.08)
    assert found.times.student == pytest.approx(0.02)
    assert (found.micro_batch_size, found.micro_batches, found.processes, found.epochs) == (8, 10, 1, 4)
    assert found.build_s == pytest.approx(2000 * 0.01)
    assert found.epoch_s == pytest.approx(10 * 0.1)
    assert {len(images) for images in seen} == {at_a_time or 8}
    # The images that are timed are real ones: a network may be faster on zeros.
    assert bool(seen[-1].abs().sum((1, 2, 3)).ne(0).all())


@pytest.mark.parametrize("fitted", [False, True])
def test_planning_does_not_change_the_run(fitted: bool) -> None:
    """Least of all the statistics of a head's BatchNorm, which is in train mode until it is fitted."""
    side, of_run, network = run_parts("unikd", "cifar/resnet8", norm="batch")
    head = of_run.fitted_head
    assert head is not None and any(isinstance(part, nn.BatchNorm2d) and part.training for part in head.modules())
    teacher = OnlineTeacher(network, precision="fp32", batch_size=16)
    loader = OneBatch(pixels=32)
    if fitted:
        of_run.prepare(itertools.repeat(teacher(loader.batch.images)))
        assert not head.training
    else:
        moved = copy.deepcopy(head)
        with torch.no_grad():
            moved(teacher(loader.batch.images))
        assert not equal(snapshot(head), snapshot(moved)), "which its forward alone would move"
    side.train()
    before = snapshot(side, teacher, head), copy.deepcopy(of_run.state_dict()), torch.get_rng_state()
    found = plan(side, of_run, teacher, loader, SIZES)
    assert equal(before, (snapshot(side, teacher, head), of_run.state_dict(), torch.get_rng_state()))
    assert found.times.teacher > 0 and found.times.student > 0


def test_a_failed_plan_leaves_the_head_in_train_mode() -> None:
    side, of_run, network = run_parts("unikd", "cifar/resnet8", norm="batch")
    teacher, loader = OnlineTeacher(network, precision="fp32"), OneBatch(pixels=32)
    head = of_run.fitted_head
    assert head is not None
    before = snapshot(side, head)
    loader.batch = loader.batch._replace(labels=torch.arange(7))
    with pytest.raises((ValueError, RuntimeError)):
        plan(side, of_run, teacher, loader, SIZES)
    assert equal(before, snapshot(side, head))
