"""The captured step of small networks (train.cuda_graph) against a plain eager PyTorch loop, and what a table takes.

Networks of CIFAR are bound by launches: their kernels are shorter than what starts them. Both sides run UniKD in fp32
on the same views from the device's memory; weights are random, which times do not show.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from speed_targets import Target, judge_all, raise_if_missed
from timing import interleaved_medians

from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.cuda_graph import WARM_UP
from unikd_fast.engine.distributed import Processes, StopSignal, start_processes
from unikd_fast.engine.timing import Throughput
from unikd_fast.engine.trainer import Trainer
from unikd_fast.fusion import AdaptiveFeatureFusion
from unikd_fast.recipes.experiments import read_experiment
from unikd_fast.recipes.pairs import CIFAR_PAIRS

BATCH, SAMPLES, BLOCK = 64, 8192, 50
EPOCHS, IMAGES = 240, 50_000
TARGET = Target("captured_over_plain", "at_least", 5.0)

Loop = Callable[[], Any]


def settings(mode: str) -> list[str]:
    return [
        "data.name=synthetic",
        "data.root=null",
        "data.num_classes=100",
        f"data.synthetic_samples={SAMPLES}",
        'data.augmentation={"crop": "pad", "padding": 4, "flip_probability": 0.5}',
        f"train.global_batch_size={BATCH}",
        f"train.cuda_graph={mode}",
        "teacher.weights=random",
        "teacher.precision=fp32",
        "teacher.fold_batch_norm=false",
        "teacher.compile=null",
        "distill.unikd.head_steps=10",
    ]


def captured(pair: str, folder: Path, processes: Processes) -> tuple[Trainer, Loop]:
    """A run of the engine, and a function that takes one more of its steps."""
    config = read_experiment(None, f"cifar100/unikd/{pair}", settings("on"))
    with StopSignal(processes) as stop:
        ready = Trainer(build_experiment(config, processes), folder, stop, label=pair, resume=False)
    ready.engine.train()
    rate = config.train.learning_rate
    data = chain.from_iterable(ready.steps.data(epoch, 0) for epoch in range(EPOCHS))
    throughput, number = Throughput(processes, global_batch_size=BATCH, loader_rate=None), iter(range(10**9))
    throughput.begin(0)

    def step() -> None:
        ready.steps.take(data, throughput, next(number), learning_rate=rate)

    return ready, step


def plain(pair: str, like: Trainer, processes: Processes) -> Loop:
    """A loop as one writes it by hand, with the formulas in plain PyTorch, from the same weights."""
    config = read_experiment(None, f"cifar100/unikd/{pair}", [*settings("off"), "loss.impl=reference"])
    of, source = build_experiment(config, processes), like.experiment
    of.student_module.load_state_dict(source.student_module.state_dict())
    of.method.load_state_dict(source.method.state_dict())
    if of.method.head is not None and source.method.head is not None:
        of.method.head.load_state_dict(source.method.head.state_dict())
    heads = () if of.method.head is None else of.method.head.module.modules()
    for module in (*of.student_module.modules(), *heads):
        if isinstance(module, AdaptiveFeatureFusion):
            module.impl = "reference"
    teacher, side, method, train = of.teacher, of.student_module.train(), of.method, config.train
    assert teacher is not None
    assert source.teacher is not None
    teacher.load_state_dict(source.teacher.state_dict())
    optimizer = torch.optim.SGD(
        side.parameters(), lr=train.learning_rate, momentum=train.momentum, weight_decay=train.weight_decay
    )
    batches: Iterator[Any] = chain.from_iterable(of.loader.train(epoch) for epoch in range(EPOCHS))
    number = iter(range(10**9))

    def step() -> torch.Tensor:
        method.set_progress(next(number) / of.steps_per_epoch)
        batch = next(batches)
        with torch.no_grad():
            target = method.target(teacher(batch.images))
        loss = method.loss(side(batch.images), target, batch)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.total.detach()

    return step


def block(step: Loop) -> Loop:
    def run() -> None:
        for _ in range(BLOCK):
            step()

    return run


@pytest.fixture(scope="module")
def processes() -> Processes:
    return start_processes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_step_over_a_plain_loop(
    benchmark: Any, record_property: Callable[[str, Any], None], tmp_path: Path, processes: Processes
) -> None:
    pair = "resnet32x4-resnet8x4"
    ready, ours = captured(pair, tmp_path, processes)
    theirs = plain(pair, ready, processes)

    # Correct before fast: the same losses from eager steps into replays, and they fall.
    losses = compare(ready, ours, theirs, 2 * WARM_UP + 4)
    for step, (one, other) in enumerate(losses):
        assert one == pytest.approx(other, rel=1e-3), f"step {step}"

    times = interleaved_medians({"captured": block(ours), "plain": block(theirs)}, rounds=7, warmup=1)
    images_per_s = {name: BLOCK * BATCH / seconds for name, seconds in times.items()}
    row: dict[str, Any] = {
        "case": f"UniKD {pair}, batch {BATCH}, fp32",
        "step_ms": {name: round(1000 * seconds / BLOCK, 3) for name, seconds in times.items()},
        "images_per_s": {name: round(rate) for name, rate in images_per_s.items()},
        "captured_over_plain": round(images_per_s["captured"] / images_per_s["plain"], 2),
    }
    finish(benchmark, record_property, row, [TARGET], block(ours))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_projected_time_of_the_table(
    benchmark: Any, record_property: Callable[[str, Any], None], tmp_path: Path, processes: Processes
) -> None:
    """UniKD on all CIFAR pairs, 240 epochs each, by a step of each: without evaluations, checkpoints and start."""
    hours: dict[str, float] = {}
    for pair in CIFAR_PAIRS:
        ready, step = captured(pair.name, tmp_path / pair.name, processes)
        for _ in range(WARM_UP + 1):
            step()
        assert all(value == value for value in ready.meter.read().values()), f"{pair.name}: a loss is NaN"
        seconds = interleaved_medians({"captured": block(step)}, rounds=5, warmup=1)["captured"] / BLOCK
        hours[pair.name] = round(seconds * (IMAGES // BATCH) * EPOCHS / 3600, 3)
        del ready, step
        torch.cuda.empty_cache()
    row = {
        "case": f"projected hours of {len(hours)} CIFAR pairs x {EPOCHS} epochs, UniKD, batch {BATCH}, fp32, one GPU",
        "hours": hours,
        "total_hours": round(sum(hours.values()), 2),
    }
    finish(benchmark, record_property, row, [], torch.cuda.synchronize)


def compare(ready: Trainer, ours: Loop, theirs: Loop, count: int) -> list[tuple[float, float]]:
    """The losses of so many steps of each."""
    pairs = []
    for _ in range(count):
        ours()
        pairs.append((ready.meter.read()["total"], theirs().item()))
    assert pairs[-1][0] < pairs[0][0]
    return pairs


def finish(
    benchmark: Any,
    record_property: Callable[[str, Any], None],
    row: dict[str, Any],
    targets: list[Target],
    timed: Callable[[], Any],
) -> None:
    row["targets"] = judge_all(targets, row)
    record_property("benchmark_rows", [row])
    benchmark.group = row["case"]
    benchmark.extra_info.update(gpu=torch.cuda.get_device_name(), torch=torch.__version__, rows=[row])
    print("", *(f"{column} {value}" for column, value in row.items()), sep="\n")
    benchmark.pedantic(timed, rounds=1)
    raise_if_missed(row["case"], row["targets"])
