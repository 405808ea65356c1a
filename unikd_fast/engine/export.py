"""The student alone, as a file that loads into the plain model."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unikd_fast.models import options_in_words

BEST = Path("checkpoints") / "best.safetensors"


def export_student(plain: nn.Module, path: Path) -> None:
    """The plain network's state dict as safetensors; loads strictly into the same torchvision, timm or zoo model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tensors = {
        k: v.detach().to("cpu", memory_format=torch.contiguous_format, copy=True) for k, v in plain.state_dict().items()
    }
    save_file(tensors, temporary, options_in_words(plain))
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def import_student(plain: nn.Module, path: Path) -> None:
    """Reads what :func:`export_student` wrote."""
    plain.load_state_dict(load_file(path), strict=True)
