"""Runs whose caches lie in a folder for each method, and the weights of their teacher."""

import json
from pathlib import Path
from typing import Any

import torch

from support.real_runs import ALONE, write_config
from unikd_fast.config import load_config
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache import OutputCache
from unikd_fast.models import build_model

SAMPLES = 96
Settings = dict[str, Any]


def save_random_teacher(path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(build_model("cifar/resnet8", num_classes=10).state_dict(), path)
    return path


def experiment(caches: Path, weights: Path, method: str = "unikd", changes: Settings | None = None) -> Experiment:
    """A run whose cache lies in caches / method, with {"section.key": value} changed."""
    sections: dict[str, Settings] = {
        "teacher": {
            "model": "cifar/resnet8",
            "weights": str(weights),
            "precision": "fp32",
            "cache": {"mode": "read_write", "dir": str(caches / "{method}")},
        },
        "student": {"model": "cifar/resnet8"},
        "distill": {"method": method, "teacher_head": "prefit", "head_steps": 4},
    }
    config = write_config(caches, **sections)
    changed = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
    return build_experiment(load_config(config, changed), ALONE)


def of(built: Experiment) -> OutputCache:
    assert built.cache is not None
    assert built.teacher is None
    return built.cache
