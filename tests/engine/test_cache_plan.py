"""What a cache costs and saves: its sizes, the measured times, the arithmetic and the table."""

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.build_method import build
from support.cache_plans import GIB, MIB, SIZES
from unikd_fast.config.schema import TrainConfig
from unikd_fast.engine import cache_plan
from unikd_fast.engine.cache_plan import CachePlan, CacheSizes, StepTimes, cache_sizes, measure_times, plan_cache
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.networks import StudentModule
from unikd_fast.errors import CacheError
from unikd_fast.methods import KD, Method, UniKD
from unikd_fast.models import LogitsOnly, build_model, extract_features
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.teacher.cache import CacheFolder, CacheKey, Codec
from unikd_fast.units import duration, size
from unikd_fast.values import Batch, Features, Loss, Target

PLAN = CachePlan(
    SIZES, StepTimes(teacher=0.3, student=0.1), micro_batch_size=50, micro_batches=10, processes=2, epochs=4
)


def test_epoch_times_with_and_without_a_cache() -> None:
    assert PLAN.epoch_s == pytest.approx(4.0)
    assert PLAN.cached_epoch_s == pytest.approx(1.0)
    assert PLAN.speedup == pytest.approx(4.0)


def with_missing(views: float) -> CachePlan:
    return replace(PLAN, sizes=replace(SIZES, missing_bytes=round(views * SIZES.view_bytes)))


@pytest.mark.parametrize(
    ("missing_views", "build_s", "break_even"),
    [(4, 12.0, 4), (3, 9.0, 3), (1, 3.0, 1), (0.1, 0.3, 1), (0, 0.0, 0)],
    ids=["nothing is built", "one view is built", "one is left", "a tenth of one is left", "all is built"],
)
def test_building_costs_the_missing_views(missing_views: float, build_s: float, break_even: int) -> None:
    """1000 samples a view at 2 x 50 in 0.3 s: 3 s a view, which is what an epoch saves."""
    plan = with_missing(missing_views)
    assert plan.build_s == pytest.approx(build_s)
    assert plan.break_even_epoch == break_even


def test_break_even_ignores_rounding() -> None:
    """An epoch saves one view; of 0.01 s for each of 9 micro-batches, three views divide to 3.0000000000000004."""
    for teacher, micro_batches, views in itertools.product((0.01, 0.07, 0.1, 0.3), range(1, 100), range(1, 8)):
        sizes = replace(SIZES, samples=2 * 11 * micro_batches, missing_bytes=views * SIZES.view_bytes)
        plan = CachePlan(sizes, StepTimes(teacher, 0.1), 11, micro_batches, processes=2, epochs=4)
        assert plan.break_even_epoch == views


def test_dropped_samples_are_built_too() -> None:
    """1049 samples are dealt as 1000: four views take a little more than four epochs save."""
    plan = replace(PLAN, sizes=replace(SIZES, samples=1049))
    assert plan.build_s == pytest.approx(12.588)
    assert plan.break_even_epoch == 5


def test_the_summary_line() -> None:
    assert PLAN.line() == (
        "4 views x 1,000 samples, 2.34 GiB (5 GiB free); an epoch takes 1 s instead of 4 s (4.00x); "
        "building takes 12 s and pays from epoch 4 on"
    )
    assert with_missing(0).line().endswith("(4.00x); nothing to build")


def test_the_table() -> None:
    assert with_missing(3).table().splitlines() == [
        "stored      4 views x 1,000 samples",
        "size        600 MiB a view, 2.34 GiB in all",
        "disk        1.76 GiB to write, 5 GiB free",
        "teacher     300.0 ms a micro-batch of 50 (measured here)",
        "student     100.0 ms a micro-batch of 50 (measured here)",
        "epoch       4 s online, 1 s cached: 4.00x",
        "building    9 s on 2 processes",
        "break-even  after 3 epochs trained from the cache",
        "4 epochs    16 s online, 13 s with building, 4 s in every later run",
    ]
    assert "9 s on 1 process\n" in replace(with_missing(1.5), processes=1).table()


def test_a_cache_that_does_not_fit_is_warned_about() -> None:
    exactly, one_byte_less = (replace(PLAN, sizes=replace(SIZES, free_bytes=2400 * MIB - less)) for less in (0, 1))
    assert "warning" not in exactly.table()
    warning = "warning     it does not fit; store fewer views, or uint8 logits"
    assert one_byte_less.table().splitlines()[-1] == warning


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (1, "1 B"), (999, "999 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 * 2**40, "10 TiB")),
        *((MIB, "1 MiB"), (GIB, "1 GiB"), (2.4 * GIB, "2.4 GiB"), (999 * MIB, "999 MiB"), (17.26 * GIB, "17.3 GiB")),
        *((1000, "1,000 B"), (1023, "1,023 B"), (1010 * MIB, "1,010 MiB"), (1023.9 * GIB, "1,024 GiB")),
        *((999.4, "999 B"), (999.6, "1,000 B"), (5000 * 2**40, "5,000 TiB"), (2.0**60, "1,048,576 TiB")),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 ms"), (3e-5, "0.03 ms"), (9.9e-7, "0.001 ms"), (1e-9, "0.000 ms"), (0.0123, "12.3 ms")),
        *((0.0999, "99.9 ms"), (0.1, "0.1 s")),
        *((0.25, "0.25 s"), (119, "119 s"), (120, "2 min"), (600, "10 min"), (7199, "120 min")),
        *((7200, "2 h"), (36_000, "10 h"), (172_799, "48 h"), (172_800, "2 days"), (864_000, "10 days")),
        *((999 * 86_400, "999 days"), (999.6 * 86_400, "1,000 days"), (123_456 * 86_400, "123,456 days")),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_no_number_has_an_exponent() -> None:
    for power in range(-600, 1200):
        for text in (size(1.03 ** max(power, 0)), duration(1.03**power)):
            assert re.fullmatch(r"[\d,]+(\.\d+)? [A-Za-z]+", text), text


CODEC = Codec("fp16", 100)  # 200 bytes, and 16 of a header


def test_sizes_of_a_missing_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(cache_plan, "free_bytes", lambda folder: asked.append(folder) or 12345)
    found = cache_sizes(tmp_path / "deep" / "down", CODEC, samples=30, views=4)
    assert found == CacheSizes(30, 4, view_bytes=30 * 216, missing_bytes=4 * 30 * 216, free_bytes=12345)
    assert found.total_bytes == 25_920
    assert asked == [tmp_path], "the nearest folder that is there"
    assert not list(tmp_path.iterdir())


def test_sizes_of_a_partial_cache(tmp_path: Path) -> None:
    """It has 4 views, one of its six shards of 20 records is done, and of the sixth only view 3 is made."""
    folder = CacheFolder.create_or_open(tmp_path, CacheKey({}), CODEC, np.arange(30), 4, 20)
    with folder.claim(2) as writer:  # type: ignore[union-attr]
        writer.write(writer.todo, CODEC.encode(torch.zeros(20, 100)))
        writer.commit()
    for views, missing in ((1, 40), (2, 40), (3, 80), (4, 100)):  # a view begins or ends within a shard
        found = cache_sizes(tmp_path, CODEC, samples=30, views=views)
        assert (found.samples, found.views, found.view_bytes) == (30, views, 30 * 216)
        assert found.missing_bytes == missing * 216
        assert found.total_bytes == views * 30 * 216
        assert found.free_bytes > 0


def test_built_views_cost_nothing(tmp_path: Path) -> None:
    folder = CacheFolder.create_or_open(tmp_path, CacheKey({}), CODEC, np.arange(30), 2, 20)
    for shard in (0, 1):
        with folder.claim(shard) as writer:  # type: ignore[union-attr]
            writer.write(writer.todo, CODEC.encode(torch.zeros(20, 100)))
            writer.commit()
    assert [cache_sizes(tmp_path, CODEC, 30, views).missing_bytes for views in (1, 2)] == [0, 20 * 216]


@pytest.mark.parametrize("file", ["manifest.json", "sample_ids.npy"])
def test_a_damaged_cache_has_no_sizes(tmp_path: Path, file: str) -> None:
    """It would be built into otherwise, or taken for one that is not there."""
    CacheFolder.create_or_open(tmp_path, CacheKey({}), CODEC, np.arange(30), 4, 20)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CacheError, match=rf"{re.escape(file)} is damaged"):
        cache_sizes(tmp_path, CODEC, samples=30, views=4)


@pytest.mark.parametrize(
    "asked", [(Codec("uint8", 100), 30, 4), (CODEC, 29, 4), (CODEC, 30, 5)], ids=["codec", "samples", "views"]
)
def test_sizes_where_the_folder_holds_another_cache(tmp_path: Path, asked: tuple[Codec, int, int]) -> None:
    CacheFolder.create_or_open(tmp_path, CacheKey({}), CODEC, np.arange(30), 4, 20)
    elsewhere = cache_sizes(tmp_path / "elsewhere", *asked)
    assert replace(cache_sizes(tmp_path, *asked), free_bytes=0) == replace(elsewhere, free_bytes=0)
    assert elsewhere.missing_bytes == elsewhere.total_bytes


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


def state_of(method: Method) -> tuple[Any, Any]:
    return method.state_dict(), None if method.head is None else method.head.state_dict()


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
    elif of_run.fixed_head is not None:
        of_run.fixed_head.module.eval()  # as the plan does: this is about the student's side
    side.train()
    side(images).logits.sum().backward()  # gradients of the run, which are its own as well
    side.network.eval()
    train = TrainConfig(total_epochs=1, global_batch_size=8, learning_rate=1.0, weight_decay=0.1, precision=precision)
    modules = [side, teacher] if of_run.fixed_head is None else [side, teacher, of_run.fixed_head.module]
    before = snapshot(*modules), copy.deepcopy(state_of(of_run)), torch.get_rng_state(), images.clone()

    targets: list[Target] = []

    @torch.no_grad()
    def target() -> Target:
        targets.append(of_run.target(features))
        return targets[-1]

    found = measure_times(side, of_run, train, batch, target(), target, seconds=0.0)
    after = snapshot(*modules), state_of(of_run), torch.get_rng_state(), images
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
    assert of_run.fixed_head is not None
    head = of_run.fixed_head.module
    assert any(isinstance(part, nn.BatchNorm2d) and part.training for part in head.modules())
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
    before = snapshot(side, teacher, head), copy.deepcopy(state_of(of_run)), torch.get_rng_state()
    found = plan(side, of_run, teacher, loader, SIZES)
    assert equal(before, (snapshot(side, teacher, head), state_of(of_run), torch.get_rng_state()))
    assert found.times.teacher > 0 and found.times.student > 0


def test_a_failed_plan_leaves_the_head_in_train_mode() -> None:
    side, of_run, network = run_parts("unikd", "cifar/resnet8", norm="batch")
    teacher, loader = OnlineTeacher(network, precision="fp32"), OneBatch(pixels=32)
    assert of_run.fixed_head is not None
    head = of_run.fixed_head.module
    before = snapshot(side, head)
    loader.batch = loader.batch._replace(labels=torch.arange(7))
    with pytest.raises((ValueError, RuntimeError)):
        plan(side, of_run, teacher, loader, SIZES)
    assert equal(before, snapshot(side, head))
