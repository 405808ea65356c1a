"""The parts of a checkpoint, and runs that have written some."""

from pathlib import Path
from typing import Any

import torch

from unikd_fast.engine.checkpoint import CheckpointWriter

PARTS: dict[str, Any] = {
    "student": {"conv.weight": torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)},
    "optimizer": {"state": {0: {"momentum": torch.ones(5, dtype=torch.bfloat16)}}, "betas": (0.9, 0.999)},
    "average": None,
    "processes": [{"rng": torch.arange(9, dtype=torch.uint8)}, {"rng": None}],
    "run": {"step": 7, "name": "ü", "scalar": torch.tensor(3)},
}


def write_steps(run: Path, *steps: int, keep: int = 9, beside_training: bool = False) -> None:
    writer = CheckpointWriter(run, keep=keep, beside_training=beside_training)
    for step in steps:
        writer.write(step, {"run": {"step": step}, "student": {"w": torch.full((3,), float(step))}})
    writer.close()
