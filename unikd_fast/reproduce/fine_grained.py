"""The cells of the study on generated classes that are hard to tell apart: a world, a teacher and students a seed."""

from typing import Any

from unikd_fast.recipes import STUDY
from unikd_fast.reproduce.cells import TEACHER, Cell

_CLASSES = 50
_TRAIN_SAMPLES = 3000
_SAMPLES = 9000  # are made; of as many a third is the test split
_EPOCHS = 10
_TEACHER_EPOCHS = 20


def fine_grained_config(cell: Cell) -> dict[str, Any]:
    """The configuration of a cell, without the weights of its teacher.

    Every seed makes images of its own; its teacher and all its students train on the same 3000 of them.
    """
    section = {"method": "none"} if cell.method == TEACHER else STUDY[cell.method].distill(cell.pair)
    epochs = _TEACHER_EPOCHS if cell.method == TEACHER else _EPOCHS
    config: dict[str, Any] = {
        "run": {"log_every_steps": 100, "evaluate_every_epochs": epochs, "probe": False},
        "data": {
            "name": "fine_grained",
            "image_size": 16,
            "num_classes": _CLASSES,
            "synthetic_samples": _SAMPLES,
            "train_samples": _TRAIN_SAMPLES,
            "seed": cell.seed,
            "augmentation": {"crop": "pad", "padding": 1},
        },
        "student": {"model": cell.pair.teacher if cell.method == TEACHER else cell.pair.student},
        "distill": section,
        "train": {
            "total_epochs": epochs,
            "global_batch_size": 50,
            "optimizer": "sgd",
            "learning_rate": cell.pair.learning_rate,
            "weight_decay": 0.0005,
            "schedule": "cosine",
        },
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    if section["method"] != "none":
        config["teacher"] = {"model": cell.pair.teacher, "precision": "fp32", "fold_batch_norm": False}
    return config
