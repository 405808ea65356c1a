"""Run folders as the engine writes them, with figures that a test has chosen."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIG: dict[str, Any] = {
    "$schema": "schema.json",
    "run": {"dir": "runs/x", "seed": 0},
    "data": {"name": "cifar100", "train_samples": None, "num_classes": None},
    "teacher": {"model": "cifar/resnet56", "weights": None},
    "student": {"model": "cifar/resnet20"},
    "distill": {"method": "unikd", "unikd": {"alpha": 4.0, "fusion": "aff"}},
    "train": {"total_epochs": 240, "max_steps": None},
    "compare": None,
}
ENVIRONMENT = {
    "command": ["launch_distill.py"],
    "versions": {"torch": "2.15.0", "x": None},
    "gpus": [],
    "world_size": 1,
}


COST: dict[str, Any] = {
    "image_size": 32,
    "parameters": 78_042,
    "bytes": 2**20,
    "multiply_adds": 12_501_632,
    "latency_ms": {"1": 0.5, "32": 8.0},
    "hardware": "a processor",
}


def config(**changes: Any) -> dict[str, Any]:
    """CONFIG with other sections, given whole."""
    return copy.deepcopy(CONFIG) | changes


def write_result(
    folder: Path,
    label: str,
    *,
    seed: int = 0,
    method: Any = "unikd",
    model: str = "cifar/resnet20",
    best: float = 70.0,
    last: float = 69.0,
    test_is_val: bool = True,
    classes_with_boxes: int = 0,
) -> Path:
    """A finished run: result.json. With boxes, AP50 is 20 above AP, AP75 2 below it, and no box is large."""

    def part(epoch: int, accuracy: float) -> dict[str, Any]:
        figures: dict[str, Any] = {"accuracy": accuracy, "top5": accuracy + 20.0, "ce": 1.25}
        if classes_with_boxes:
            by_class = {f"class {i}": accuracy for i in range(classes_with_boxes)}
            figures = {"ap": accuracy, "ap50": accuracy + 20.0, "ap75": accuracy - 2.0, "ap_by_class": by_class}
            figures |= {"ap_small": accuracy - 30.0, "ap_medium": accuracy + 3.0}
        return {"epoch": epoch, "val": figures, "test": figures}

    result = {
        "label": label,
        "seed": seed,
        "method": method,
        "model": model,
        "steps": 10,
        "test_is_val": test_is_val,
        "best": part(7, best),
        "last": part(9, last),
        "weights": str(folder / "student.safetensors"),
        "cost": COST,
    }
    write_json(folder / "result.json", result)
    return folder


def write_run_folder(folder: Path, content: dict[str, Any] | None = None) -> Path:
    """config.json and environment.json."""
    write_json(folder / "config.json", CONFIG if content is None else content)
    write_json(folder / "environment.json", ENVIRONMENT)
    return folder


def write_metrics(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def evaluation(epoch: int, **values: Any) -> dict[str, Any]:
    return {"kind": "evaluation", "step": 10 * epoch, "epoch": epoch, **values}


def training(epoch: float, **terms: Any) -> dict[str, Any]:
    """A "train" record: the terms stand before the learning rate."""
    return {
        "kind": "train",
        "step": int(10 * epoch),
        "epoch": epoch,
        "total": 9.0,
        "ce": 2.0,
        **terms,
        "lr": 0.1,
        "images_per_s": 1000.0 + epoch,
        "data_wait_share": 0.25,
        "memory_gib": 1.0,
    }


def some_logits(samples: int, classes: int, *, noise: float, seed: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Logits that are right for most samples, and labels in which every class occurs."""
    labels = np.arange(samples) % classes
    random = np.random.default_rng(seed)
    logits = random.normal(size=(samples, classes)) * noise
    logits[np.arange(samples), labels] += 6.0
    return logits, labels
