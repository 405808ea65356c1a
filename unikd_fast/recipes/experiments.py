"""Configurations of all experiments."""

from collections.abc import Iterator
from typing import Any

from unikd_fast.recipes.pairs import CIFAR_PAIRS, IMAGENET_PAIRS, Pair, networks
from unikd_fast.recipes.settings import METHODS

TEACHERS_ROOT = "CIFAR100_TEACHERS"
"""Environment variable of the folder that holds the published teachers."""

# On ImageNet the tables have these alone.
_ON_IMAGENET = ("none", "at", "ofd", "crd", "reviewkd", "kd", "dkd", "unikd", "blockwise")

_TRAIN: dict[str, dict[str, Any]] = {
    "cifar100": {
        "total_epochs": 240,
        "global_batch_size": 64,
        "optimizer": "sgd",
        "weight_decay": 0.0005,
        "schedule": "step",
        "milestones": [150, 180, 210],
    },
    "imagenet": {
        "total_epochs": 100,
        "global_batch_size": 512,
        "optimizer": "sgd",
        "weight_decay": 0.0001,
        "schedule": "step",
        "milestones": [30, 60, 90],
        "precision": "bf16",
        "channels_last": True,
    },
}
_DATA: dict[str, dict[str, Any]] = {
    "cifar100": {"name": "cifar100", "root": "${CIFAR100_ROOT}", "image_size": 32},
    "imagenet": {"name": "imagenet", "root": "${IMAGENET_ROOT}", "image_size": 224, "num_classes": 1000, "workers": 8},
}


def experiment(method: str, pair: Pair) -> dict[str, Any]:
    """The configuration of a method, one of `METHODS`, with a pair of networks.

    Example:
        >>> experiment("kd", CIFAR_PAIRS[0])["distill"]
        {'method': 'kd', 'ce_weight': 0.1, 'beta': 0.9, 'temperature': 4.0}
    """
    return _config(f"{pair.data}/{method}/{pair.name}", method, pair, pair.student)


def alone(pair: Pair, network: str) -> dict[str, Any]:
    """The configuration that trains a network of a pair by itself, with labels alone: its student, or its teacher.

    Example:
        >>> alone(CIFAR_PAIRS[0], "cifar/resnet56")["train"]["learning_rate"]
        0.05
    """
    name = network.rpartition("/")[2] if pair.data == "cifar100" else pair.name
    return _config(f"{pair.data}/none/{name}", "none", pair, network)


def experiments() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every configuration with its path below configs/."""
    for name, pair in networks().items():
        yield f"cifar100/none/{name}.json", alone(pair, f"cifar/{name}")
    for method in METHODS:
        pairs = (*CIFAR_PAIRS, *(IMAGENET_PAIRS if method in _ON_IMAGENET else ()))
        for pair in pairs:
            if method != "none" or pair.data == "imagenet":
                yield f"{pair.data}/{method}/{pair.name}.json", experiment(method, pair)


def _config(name: str, method: str, pair: Pair, student: str) -> dict[str, Any]:
    # A student's rate is that of its pair; all teachers of a data set have one.
    rate = pair.learning_rate if student == pair.student or pair.data == "imagenet" else 0.05
    weights = pair.teacher_weights
    if pair.data == "cifar100":
        weights = f"${{{TEACHERS_ROOT}}}/{weights}"
    teacher = {"teacher": {"model": pair.teacher, "weights": weights}} if method != "none" else {}
    return {
        "$schema": "../../schema.json",
        "run": {"dir": f"runs/{name}-{{hash}}", "log_every_steps": 100},
        "data": _DATA[pair.data],
        **teacher,
        "student": {"model": student},
        "distill": METHODS[method].distill(pair),
        "train": {**_TRAIN[pair.data], "learning_rate": rate},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
