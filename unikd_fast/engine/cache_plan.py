"""What a cache of the teacher's outputs costs and saves, from steps measured on this machine."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unikd_fast.config.schema import TrainConfig
from unikd_fast.engine.optimizer import build_optimizer
from unikd_fast.engine.zero import autocast_dtype
from unikd_fast.io import free_bytes
from unikd_fast.methods import Method
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.teacher.cache import CacheFolder, Codec
from unikd_fast.teacher.cache.files import stored_bytes
from unikd_fast.teacher.cache.manifest import MANIFEST
from unikd_fast.units import duration, size
from unikd_fast.values import Batch, StudentOutput, Target

if TYPE_CHECKING:
    from unikd_fast.engine.build import Experiment

_ROUNDS, _WARMUP, _SECONDS = 9, 2, 3.0


@dataclass(frozen=True)
class StepTimes:
    """Seconds per micro-batch on one process: of the teacher with its head, and of the student's step with the loss."""

    teacher: float
    student: float


@dataclass(frozen=True)
class CacheSizes:
    """Bytes that a cache of `views` views of `samples` samples takes on disk, of which some are still to be written."""

    samples: int
    views: int
    view_bytes: int  # of all samples
    missing_bytes: int
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.views * self.view_bytes


@dataclass(frozen=True)
class CachePlan:
    """What a cache holds, how long the epochs of a run take with and without it, and when it has paid off.

    Args:
        sizes: sizes of the cache.
        times: measured times.
        micro_batch_size: samples of a micro-batch.
        micro_batches: number of micro-batches in an epoch on one process.
        processes: number of processes that build and train.
        epochs: number of epochs that the run trains.
    """

    sizes: CacheSizes
    times: StepTimes
    micro_batch_size: int
    micro_batches: int
    processes: int
    epochs: int

    @property
    def build_s(self) -> float:
        """Return the seconds that the teacher's forward passes over what is missing take."""
        outputs = self.sizes.missing_bytes / self.sizes.view_bytes * self.sizes.samples
        return outputs / (self.processes * self.micro_batch_size) * self.times.teacher

    @property
    def epoch_s(self) -> float:
        """Return the seconds of an epoch without a cache."""
        return self.micro_batches * (self.times.teacher + self.times.student)

    @property
    def cached_epoch_s(self) -> float:
        """Return the seconds of an epoch with a cache, which is read ahead of the steps."""
        return self.micro_batches * self.times.student

    @property
    def speedup(self) -> float:
        return self.epoch_s / self.cached_epoch_s

    @property
    def break_even_epoch(self) -> int:
        """Return how many epochs, of this run and later ones, it takes to make up for building the cache."""
        return math.ceil(self.build_s / (self.micro_batches * self.times.teacher) - 1e-6)

    def line(self) -> str:
        """Return the plan as one line, for the start of a run."""
        build = (
            f"building takes {duration(self.build_s)} and pays from epoch {self.break_even_epoch} on"
            if self.sizes.missing_bytes
            else "nothing to build"
        )
        return (
            f"{self.sizes.views} views x {self.sizes.samples:,} samples, {size(self.sizes.total_bytes)} "
            f"({size(self.sizes.free_bytes)} free); an epoch takes {duration(self.cached_epoch_s)} instead of "
            f"{duration(self.epoch_s)} ({self.speedup:.2f}x); {build}"
        )

    def table(self) -> str:
        """Return the plan in full, as a table."""
        teacher, student = 1000 * self.times.teacher, 1000 * self.times.student
        whole, cached = self.epochs * self.epoch_s, self.epochs * self.cached_epoch_s
        rows = [
            ("stored", f"{self.sizes.views} views x {self.sizes.samples:,} samples"),
            ("size", f"{size(self.sizes.view_bytes)} a view, {size(self.sizes.total_bytes)} in all"),
            ("disk", f"{size(self.sizes.missing_bytes)} to write, {size(self.sizes.free_bytes)} free"),
            ("teacher", f"{teacher:.1f} ms a micro-batch of {self.micro_batch_size} (measured here)"),
            ("student", f"{student:.1f} ms a micro-batch of {self.micro_batch_size} (measured here)"),
            (
                "epoch",
                f"{duration(self.epoch_s)} online, {duration(self.cached_epoch_s)} cached: {self.speedup:.2f}x",
            ),
            ("building", f"{duration(self.build_s)} on {self.processes} process{'es' if self.processes > 1 else ''}"),
            ("break-even", f"after {self.break_even_epoch} epochs trained from the cache"),
            (
                f"{self.epochs} epochs",
                f"{duration(whole)} online, {duration(self.build_s + cached)} with building, "
                f"{duration(cached)} in every later run",
            ),
        ]
        if self.sizes.missing_bytes > self.sizes.free_bytes:
            rows.append(("warning", "it does not fit; store fewer views, or uint8 logits"))
        return "\n".join(f"{name:<12}{text}" for name, text in rows)


def cache_sizes(path: Path, codec: Codec, samples: int, views: int) -> CacheSizes:
    """Return the sizes of the cache in a folder, or of the one that would be made there if there is none like it.

    Raises:
        CacheError: the cache in the folder is damaged.
    """
    folder = CacheFolder.open(path) if (path / MANIFEST).exists() else None
    if folder is None or (folder.codec, folder.samples) != (codec, samples) or folder.views < views:
        view_bytes = samples * stored_bytes(codec.record_bytes)
        return CacheSizes(samples, views, view_bytes, views * view_bytes, _free_bytes(path))
    info = folder.info()
    view_bytes = info.bytes_total // info.views
    missing = folder.missing_bytes(views)
    return CacheSizes(samples, views, view_bytes, missing, _free_bytes(path))


def plan_cache(experiment: "Experiment", teacher: OnlineTeacher, sizes: CacheSizes) -> CachePlan:
    """Measure teacher and student on one micro-batch of this process, without changing the run.

    Args:
        experiment: the run; the head of its method need not be fitted.
        teacher: teacher that runs where there is no cache.
        sizes: sizes before anything is built.
    """
    train, loader, method = experiment.config.train, experiment.loader, experiment.method
    batch = next(loader.train(0))
    # The teacher is timed on as many images as it takes at a time, where it pads smaller batches.
    size = teacher.batch_size or len(batch.images)
    images = batch.images[torch.arange(size, device=batch.images.device) % len(batch.images)]

    @torch.no_grad()
    def answer(images: Tensor) -> Target:
        return method.target(teacher(images))

    with _in_eval_mode(None if method.fixed_head is None else method.fixed_head.module):
        held = answer(batch.images)
        times = measure_times(experiment.student_module, method, train, batch, held, partial(answer, images))
    share = len(batch.images) / size
    return CachePlan(
        sizes,
        StepTimes(times.teacher * share, times.student),
        micro_batch_size=loader.schedule.micro_batch_size,
        micro_batches=loader.steps_per_epoch * train.accumulation_steps,
        processes=experiment.processes.world_size,
        epochs=experiment.epochs,
    )


def measure_times(
    student_module: nn.Module,
    method: Method,
    train: TrainConfig,
    batch: Batch,
    target: Target,
    teacher: Callable[[], Any],
    *,
    seconds: float = _SECONDS,
) -> StepTimes:
    """Time the teacher and a student step on one micro-batch, without changing the run.

    A copy of the student is trained, without DeepSpeed, so the cost of DeepSpeed is not included.

    Args:
        student_module: the run's student.
        method: prepared method whose loss is computed.
        train: training settings of the run.
        batch: a micro-batch.
        target: the teacher's outputs for this batch.
        teacher: function that runs the teacher, with its head if it has one.
        seconds: time limit, apart from two rounds of warm-up and one more.
    """
    device = batch.images.device
    autocast = autocast_dtype(train.precision)
    trained = copy.deepcopy(student_module).train()
    optimizer = build_optimizer(trained.parameters(), train)

    def step() -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            student: StudentOutput = trained(batch.images)
        method.loss(student, target, batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    found: dict[str, list[float]] = {"teacher": [], "student": []}
    began = time.perf_counter()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for done in range(-_WARMUP, _ROUNDS):
            for name, compute in (("teacher", teacher), ("student", step)):
                taken = _timed(compute, device)
                if done >= 0:
                    found[name].append(taken)
            if done >= 0 and time.perf_counter() - began > seconds:
                break
    return StepTimes(*(statistics.median(times) for times in found.values()))


def _free_bytes(path: Path) -> int:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return free_bytes(there)


@contextmanager
def _in_eval_mode(head: nn.Module | None) -> Iterator[None]:
    """Put a head into eval mode: one that is not fitted yet would change the statistics of its normalisation."""
    training = head is not None and head.training
    if head is not None:
        head.eval()
    try:
        yield
    finally:
        if head is not None:
            head.train(training)


def _timed(compute: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    compute()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
