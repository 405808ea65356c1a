"""The steps of a pair of networks on the same images: distilled, from the teacher's cache, and the student's own."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache import ready_cache
from unikd_fast.engine.distributed import StopSignal, start_processes
from unikd_fast.engine.step import train_step
from unikd_fast.engine.zero import start_engine
from unikd_fast.recipes.experiments import read_experiment
from unikd_fast.teacher.cache.outputs import read_ahead
from unikd_fast.values import Batch, Target

CUDA = torch.cuda.is_available()


class Pair(NamedTuple):
    """A teacher and a student, with what their recipe is named and the images of a step."""

    config: str | None
    recipe: str | None
    batch: int
    images: str


PAIRS = {
    "R50-MV1": Pair("imagenet_r50_mbv1", None, 64 if CUDA else 8, "224 px"),
    "R32x4-R8x4": Pair(None, "cifar100/unikd/resnet32x4-resnet8x4", 64, "32 px"),
}


def experiment(pair: str, method: str, folder: Path | None = None, batches: int = 2) -> Experiment:
    """Return the run of a method on a few batches of generated images, with random weights, in fp32.

    Args:
        pair: name of the pair in PAIRS.
        method: name of the method.
        folder: folder for a cache of the teacher. If None, there is no cache.
        batches: number of batches of an epoch.
    """
    config, recipe, batch, _ = PAIRS[pair]
    overrides = [
        "data.name=synthetic",
        "data.root=null",
        f"data.synthetic_samples={batches * batch}",
        "teacher.weights=random",
        "teacher.precision=fp32",
        "teacher.fold_batch_norm=false",
        "train.precision=fp32",
        f"train.global_batch_size={batch}",
        f"distill.method={method}",
        "train.learning_rate=0.001",
        "train.total_epochs=2",
    ]
    if method == "unikd":
        overrides.append("distill.unikd.head_steps=2")
    if folder is not None:
        overrides += ["teacher.cache.mode=read_write", f"teacher.cache.dir={folder}"]
        overrides += [f"teacher.cache.batch_size={batch}"]
    return build_experiment(read_experiment(config, recipe, overrides), start_processes())


@dataclass
class Steps:
    """The steps of one method: online, from the cache, with targets in memory; and their parts."""

    online: Callable[[], torch.Tensor]
    cached: Callable[[], torch.Tensor]
    held: Callable[[], torch.Tensor]
    teacher: Callable[[], Any]
    student: Callable[[], torch.Tensor]


def steps(pair: str, method: str, folder: Path) -> Steps:
    """Build the steps of a pair, and its cache in a folder."""
    processes = start_processes()
    distilled, cached, alone = experiment(pair, method), experiment(pair, method, folder), experiment(pair, "none")
    assert cached.cache is not None
    assert distilled.teacher is not None
    teacher, cache = distilled.teacher, cached.cache
    with StopSignal(processes) as stop:
        ready_cache(cached, stop, method)
    if cached.method.fixed_head is not None:
        distilled.method.head.adopt(cached.method.fixed_head.module.state_dict())
    batch: Batch
    batch, held = next(cached.micro_batches(0))
    engines = [start_engine(e.config, e.student_module, processes) for e in (distilled, cached, alone)]
    for engine in engines:
        engine.train()

    def stored() -> Iterator[Target]:
        positions = next(iter(cached.loader.schedule.order(0)))
        while True:
            for outputs in read_ahead(cache.folder, itertools.repeat(positions, 1000), 0, device=processes.device):
                yield Target(*outputs)

    reading = stored()
    return Steps(
        online=lambda: train_step(engines[0], teacher, distilled.method, batch, update=True).total,
        cached=lambda: train_step(engines[1], None, cached.method, batch, next(reading), update=True).total,
        held=lambda: train_step(engines[1], None, cached.method, batch, held, update=True).total,
        teacher=lambda: teacher(batch.images),
        student=lambda: train_step(engines[2], None, alone.method, batch, update=True).total,
    )
