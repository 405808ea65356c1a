"""The run says when its loader holds it up, and how fast both are."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.odd_images import encoded, picture
from support.real_runs import ALONE, train_here, write_config
from unikd_fast.config import load_config
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.timing import Throughput, loader_rate

ON_GPU = Processes(0, 1, 0, torch.device("meta"))  # anything but a CPU; nothing is computed on it
SECOND = Processes(1, 2, 1, torch.device("cpu"))


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def batches(self, *seconds: float) -> Iterator[int]:
        for i, taken in enumerate(seconds):
            self.now += taken
            yield i


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_loader_is_timed_after_its_start(clock: Clock) -> None:
    # Four batches of start and of what was made meanwhile, then eight at 0.25 s, and no more than these are taken.
    batches = clock.batches(5.0, 0.0, 0.0, 0.0, *[0.25] * 8, 100.0)
    assert loader_rate(batches, ALONE, micro_batch_size=16) == pytest.approx(64.0)
    assert next(batches) == 12


def test_a_slow_loader_is_timed_on_fewer_batches(clock: Clock) -> None:
    batches = clock.batches(*[4.0] * 20)
    assert loader_rate(batches, ALONE, micro_batch_size=16) == pytest.approx(4.0)
    assert next(batches) == 3


def test_one_batch_gives_no_rate(clock: Clock) -> None:
    assert loader_rate(clock.batches(4.0), ALONE, micro_batch_size=16) is None
    assert loader_rate(clock.batches(), ALONE, micro_batch_size=16) is None


def test_the_slowest_process_sets_the_rate(clock: Clock) -> None:
    class Two(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, 20.0]

        def barrier(self) -> None:
            pass

    batches = clock.batches(*[0.25] * 12)
    assert loader_rate(batches, Two(0, 2, 0, torch.device("cpu")), micro_batch_size=16) == pytest.approx(40.0)


def trained(
    clock: Clock, processes: Processes, *, wait_s: float, step_s: float, rate: float | None, start_s: float = 3.0
) -> dict[str, float]:
    """The readings after an epoch of five steps of 10 images; a slow start does not make a slow loader."""
    throughput = Throughput(processes, global_batch_size=10, loader_rate=rate)
    throughput.begin(20)
    batches = clock.batches(start_s, *[wait_s] * 4)
    for _ in range(5):
        throughput.next(batches)
        clock.now += step_s
    return throughput.read(25)


def test_the_readings_are_of_the_whole_time(clock: Clock) -> None:
    read = trained(clock, ALONE, wait_s=0.5, step_s=0.6, rate=None)
    assert read == {"images_per_s": pytest.approx(50 / 8), "data_wait_share": pytest.approx(5 / 8)}


@pytest.mark.parametrize(
    ("processes", "wait_s", "step_s", "rate", "bound"),
    [
        # Five steps of 0.5 s take 20 images/s: 24 of them are enough. The waits between are the loader's.
        (ALONE, 0.5, 0.5, 23.9, "delivers 24 images/s, 1.19 times the 20 images/s"),
        (ALONE, 0.5, 0.5, 24.1, None),
        (ALONE, 0.5, 0.5, None, None),
        (SECOND, 0.5, 0.5, 5.0, None),  # the first process speaks
        # On a GPU the waits of the host say nothing: 50 images in 4.5 s behind the start are 11.1 a second.
        (ON_GPU, 0.5, 0.5, 13.0, "delivers 13 images/s, 1.17 times the 11 images/s"),
        (ON_GPU, 0.5, 0.5, 13.5, None),
    ],
)
def test_a_loader_below_1_2_times_the_steps_is_named(
    processes: Processes,
    wait_s: float,
    step_s: float,
    rate: float | None,
    bound: str | None,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="unikd_fast"):
        trained(clock, processes, wait_s=wait_s, step_s=step_s, rate=rate)
    assert (bound in caplog.text and "loader-bound" in caplog.text) if bound else caplog.text == ""


def test_the_warning_is_logged_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    throughput = Throughput(ALONE, global_batch_size=10, loader_rate=1.0)
    for epoch in range(3):
        throughput.begin(epoch)
        throughput.next(clock.batches(0.1))
        clock.now += 0.1
        throughput.read(epoch + 1)
    assert caplog.text.count("loader-bound") == 1


@pytest.mark.long
def test_a_run_bound_by_its_loader_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part, count in (("train", 16), ("val", 4)):
        for i in range(count):
            folder = tmp_path / "images" / part / f"class_{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:03}.png").write_bytes(encoded("PNG", picture().resize((640, 480))))
    path = write_config(
        tmp_path,
        run={"log_every_steps": 8, "checkpoint_every_steps": None, "evaluate_every_epochs": 99},
        data={"name": "image_folder", "root": str(tmp_path / "images"), "num_classes": 2, "loader": "torchvision"},
        student={"model": "cifar/resnet8"},
        distill={"method": "none"},
        train={"total_epochs": 30, "global_batch_size": 4, "accumulation_steps": 1, "ema_decay": None},
    )
    train_here(load_config(path, ["data.workers=0"]))
    assert caplog.text.count("loader-bound: the loader delivers") == 1
