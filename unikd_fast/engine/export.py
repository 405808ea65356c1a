"""The student alone, as a file that loads into the plain model."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from unikd_fast.errors import FileError
from unikd_fast.io import make_folder, write_file
from unikd_fast.models import Preprocessing, options_in_words, preprocessing_in_words

BEST = Path("checkpoints") / "best.safetensors"
STUDENT = Path("student.safetensors")


def export_student(plain: nn.Module, path: Path, preprocessing: Preprocessing | None = None) -> None:
    """Write the plain network's state dict as safetensors; loads strictly into the same torchvision, timm or zoo model.

    Args:
        preprocessing: of its images, kept in the file's metadata, where a run that loads these weights finds it.

    Raises:
        FileError: the disk is full, or cannot be written to.
    """
    make_folder(path.parent)
    tensors = {
        k: v.detach().to("cpu", memory_format=torch.contiguous_format, copy=True) for k, v in plain.state_dict().items()
    }
    metadata = (options_in_words(plain) or {}) | preprocessing_in_words(preprocessing)
    write_file(path, save(tensors, metadata or None))


def import_student(plain: nn.Module, path: Path) -> None:
    """Reads what :func:`export_student` wrote.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        plain.load_state_dict(load_file(path), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        said = str(error).partition("\n")[0]
        raise FileError(f"{path} cannot be read: {said}; restore it, or start a new run folder") from error
