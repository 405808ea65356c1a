"""Runs whose steps are captured where there is a GPU, and are the same program on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.real_runs import ALONE, cached_config, newest_checkpoint, train_records
from unikd_fast.config import Config, load_config
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.cuda_graph import CapturedSteps
from unikd_fast.engine.distributed import Processes, StopSignal
from unikd_fast.engine.timing import Throughput
from unikd_fast.engine.trainer import Trainer

# All that changes from step to step: views, rate, ramps, an average; and clipping, at about half of the steps.
CHANGING: dict[str, Any] = {
    "run": {"checkpoint_every_steps": None, "evaluate_every_epochs": 9, "probe": False, "test_logits": False},
    "data": {
        "name": "digits",
        "image_size": 16,
        "train_samples": 96,
        "augmentation": {"crop": "pad", "padding": 2, "flip_probability": 0.5},
    },
    "student": {"model": "cifar/resnet8"},
    "distill": {"teacher_head": "prefit", "head_steps": 4, "alpha_ramp_epochs": 2.0},
    "train": {
        "total_epochs": 4,
        "max_steps": 20,
        "accumulation_steps": 1,
        "learning_rate": 0.002,
        "warmup_epochs": 1.0,
        "clip_grad_norm": 4.0,
        "ema_decay": 0.9,
    },
}
# Settings of methods that differ from the defaults, so that ramps rise and second views can be planned.
SETTINGS: dict[str, dict[str, Any]] = {
    "dkd": {"distill": {"dkd": {"ramp_epochs": 2.0}}},
    "reviewkd": {"distill": {"reviewkd": {"ramp_epochs": 2.0}}},
    "mlkd": {"data": {"second_view": {"crop": "pad", "padding": 1, "flip_probability": 0.5}}},
    "crd": {"distill": {"crd": {"negatives": 64, "width": 16}}},
}


def config_of(folder: Path, weights: Path, name: str, method: Any, **sections: dict[str, Any]) -> Config:
    """CHANGING for a method, with the settings of ``sections``."""
    of_method = SETTINGS.get(method, {}) if isinstance(method, str) else {}
    merged = {
        key: {**CHANGING.get(key, {}), **of_method.get(key, {}), **sections.get(key, {})}
        for key in {*CHANGING, *of_method, *sections} - {"teacher"}
    }
    merged["distill"]["method"] = method
    teacher = sections.get("teacher", {})
    return load_config(
        cached_config(
            folder,
            weights,
            name=name,
            cache={"mode": "off"},
            teacher={"weights": str(weights), "fidelity": {"min_agreement": 0.0}, **teacher},
            **merged,
        )
    )


def prepared(config: Config, processes: Processes = ALONE) -> Trainer:
    """A run before its first step, in training mode."""
    experiment = build_experiment(config, processes)
    with StopSignal(processes) as stop:
        ready = Trainer(experiment, Path(config.run.dir), stop, label="run", resume=False)
    ready.engine.train()
    return ready


def inputs(ready: Trainer) -> Iterator[Any]:
    """What its steps take, epoch after epoch."""
    return chain.from_iterable(ready.steps.data(epoch, 0) for epoch in range(ready.experiment.epochs))


def curve(folder: Path) -> list[dict[str, float]]:
    """The loss terms of every step."""
    return [
        {key: value for key, value in record.items() if key not in ("kind", "step", "epoch")}
        for record in train_records(folder)
        if record["kind"] == "train"
    ]


def state(folder: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint, by their path."""
    saved = newest_checkpoint(folder)
    return dict(_tensors({key: saved[key] for key in ("student", "optimizer", "average", "method")}, ""))


def _tensors(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(value, f"{path}/{key}")


class Recorder(TorchDispatchMode):
    """Notes what a step asks of the device.

    Attributes:
        calls: operation and Python arguments of each call: what a graph would hold for good.
        outside: addresses of the tensors that a step took which it had not made: what a graph would come back to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []
        self.outside: set[int] = set()
        self._made: dict[int, Any] = {}  # storages, held so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "profiler":  # the optimiser marks where it begins and ends
            return func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        taken = {_address(tensor) for tensor in tensors}
        self.outside |= taken - self._made.keys()
        self.calls.append((str(func), repr([leaf for leaf in leaves if not isinstance(leaf, Tensor)])))
        if str(func).startswith("aten.index") and _has_mask(args[1]):
            self.calls.append(("aten.nonzero.of a mask", ""))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in taken | self.outside:
                self._made[_address(tensor)] = tensor.untyped_storage()
        return result


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(indices))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def breaking_at(step: int) -> Iterator[None]:
    """Within the block runs of captured steps end at this one, with a ZeroDivisionError."""
    taken = CapturedSteps.take

    def breaks(self: CapturedSteps, data: Any, throughput: Throughput, number: int, *, learning_rate: float) -> None:
        if number == step:
            raise ZeroDivisionError
        taken(self, data, throughput, number, learning_rate=learning_rate)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CapturedSteps, "take", breaks)
        yield
