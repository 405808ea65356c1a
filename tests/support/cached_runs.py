"""Runs that train from stored outputs, the work of a process alone, and what they are compared by."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.real_runs import (
    ALONE,
    opened,
    train_records,
)
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.cache import ready_cache
from unikd_fast.engine.distributed import Processes, StopSignal
from unikd_fast.teacher.cache import CacheFolder
from unikd_fast.values import Batch, Gaussian, Target

STEPS = 18  # three epochs of six
KD = {"method": "kd", "teacher_head": "anchored", "head_steps": None}


@dataclass(frozen=True)
class Pretended(Processes):
    """One of several processes, without the others: it hears what the first one said."""

    said: list[Any] = field(default_factory=list)

    def broadcast(self, value: Any) -> Any:
        if not self.is_first:
            return self.said.pop(0)
        self.said.append(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def barrier(self) -> None:
        pass


def pretended(rank: int, said: list[Any] | None = None) -> Pretended:
    return Pretended(rank=rank, world_size=2, local_rank=rank, device=ALONE.device, said=list(said or []))


def made_ready(experiment: Experiment) -> dict[str, Any]:
    ready_cache(experiment, StopSignal(ALONE), "test")
    assert experiment.teacher_record is not None
    return experiment.teacher_record


def ready(config: Path, processes: Processes = ALONE) -> Experiment:
    """An experiment that could train: with its cache built."""
    experiment = opened(config, processes)
    made_ready(experiment)
    return experiment


def payloads(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    folder = CacheFolder.open(path)
    assert folder.verify().ok
    return folder.read(range(folder.samples * folder.views))


def state_of(path: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.glob("shard-*")}


def same_weights(left: Path, right: Path) -> bool:
    a, b = load_file(left / "student.safetensors"), load_file(right / "student.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(folder: Path) -> list[dict[str, float]]:
    return [record for record in train_records(folder) if record["kind"] == "train"]  # type: ignore[comparison-overlap]


def by_sample(batches: Iterator[tuple[Batch, Target | None]]) -> dict[int, tuple[Tensor, Tensor, Gaussian | None]]:
    found = {}
    for batch, target in batches:
        assert target is not None
        assert isinstance(target.logits, Tensor)
        for row, sample in enumerate(batch.sample_ids.tolist()):
            gaussian = None if target.gaussian is None else Gaussian(*(part[row] for part in target.gaussian))
            found[sample] = (batch.images[row], target.logits[row], gaussian)
    return found


def flat(found: tuple[Tensor, Tensor, Gaussian | None]) -> list[Tensor]:
    images, logits, gaussian = found
    return [images, logits, *(gaussian or ())]


def assert_within_one_unit(left: Any, right: Any) -> None:
    """Outputs in fp16 that were nearly the same before they were rounded.

    What lies between two numbers of fp16 may go to either; fp32 differs by up to 2^-15 of a row's size, as for
    fidelity. Measured: the logits are the same bit for bit, 0.2 % of the Gaussians' numbers are not.
    """
    for a, b in zip((left[0], *(left[1] or ())), (right[0], *(right[1] or ())), strict=True):
        a, b = a.double(), b.double()
        size = b.square().mean(1, keepdim=True).sqrt()
        assert bool(((a - b).abs() <= 2.0**-10 * torch.maximum(a.abs(), b.abs()) + 2.0**-15 * size).all())
        assert float((a != b).double().mean()) < 0.01
