"""Two short runs with a checkpoint of every step, and what the tests of unikd export do with them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support.build_method import for_method
from support.real_runs import ALONE, train_here, write_config
from unikd_fast.cli import main
from unikd_fast.config import Config, load_config
from unikd_fast.engine.folder import open_run_folder
from unikd_fast.models import CIFAR_MODELS

STEPS = 6

SHORT: dict[str, Any] = {
    "run": {"keep_checkpoints": 9, "evaluate_every_epochs": 1},
    "data": {"name": "digits", "image_size": 16, "num_classes": None, "train_samples": 32},
    "teacher": {"model": "cifar/resnet8", "weights": "random", "precision": "fp32", "fidelity": {"batches": 0}},
    "student": {"model": "cifar/resnet8"},
    "train": {"accumulation_steps": 1, "total_epochs": STEPS // 2},
}
ALONE_TRAINED = {"teacher": None, "distill": {"method": "none"}}


def short(folder: Path, name: str, **sections: Any) -> Config:
    """Three epochs of two steps on digits, with a checkpoint of every step."""
    path = write_config(folder, name=name)
    raw = json.loads(path.read_text())
    for section, values in (*SHORT.items(), *sections.items()):
        raw[section] = None if values is None else {**(raw.get(section) or {}), **values}
    raw["distill"] = for_method(raw["distill"])
    path.write_text(json.dumps(raw))
    return load_config(path)


def trained(config: Config) -> Path:
    """Trains in this process, in a run folder with everything that launch_distill.py puts there."""
    with open_run_folder(config, ALONE, resume=False):
        return train_here(config)


@dataclass(frozen=True)
class Runs:
    averaged: Path  # UniKD, with an exponential average: the student is a FeatureExtractor
    alone: Path  # no teacher and no average: LogitsOnly


def export(run: Path, to: Path, *arguments: str) -> int:
    return main(["export", str(run), "--to", str(to), *arguments])


def resnet8(path: Path) -> nn.Module:
    """The plain network with the weights of a file, without any of our export code."""
    network = CIFAR_MODELS["resnet8"](num_classes=10)
    network.load_state_dict(load_file(path), strict=True)
    return network.eval()


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stripped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
