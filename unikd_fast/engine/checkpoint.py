"""The state of a run in one file, written atomically, readable at any ZeRO stage.

It holds the student's side, the method's head, the optimiser by parameter name, the exponential average, and per
process the buffers and random states that make a continued run equal to an uninterrupted one bit for bit. The teacher
is not in it.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unikd_fast.engine.optimizer_state import collect_optimizer_state
from unikd_fast.engine.processes import Processes
from unikd_fast.errors import CacheError
from unikd_fast.methods import Method

FORMAT = 1
LAST = Path("checkpoints") / "last.pt"
BEST = Path("checkpoints") / "best.safetensors"


def save_checkpoint(
    folder: Path, *, step: int, engine: Any, method: Method, average: nn.Module | None, processes: Processes
) -> None:
    """Writes checkpoints/last.pt; all processes must call it, the first one writes.

    The previous checkpoint stays readable until the new one is complete on disk.
    """
    side: nn.Module = engine.module
    optimizer = collect_optimizer_state(engine)
    own = {
        "buffers": dict(side.named_buffers()),
        "average_buffers": {} if average is None else dict(average.named_buffers()),
        "rng": _random_state(processes.device),
    }
    of_processes = processes.gather(own)
    if processes.is_first:
        _write(
            folder / LAST,
            {
                "format": FORMAT,
                "step": step,
                "world_size": processes.world_size,
                "student": side.state_dict(),
                "method": method.state_dict(),
                "optimizer": optimizer,
                "average": None if average is None else average.state_dict(),
                "processes": of_processes,
            },
        )
    processes.barrier()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The checkpoint of a run folder on the CPU, or None."""
    path = folder / LAST
    if not path.exists():
        return None
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {checkpoint['format']}, this version reads {FORMAT}; start a new run folder"
        )
    return checkpoint


def restore_weights(checkpoint: dict[str, Any], side: nn.Module, method: Method, processes: Processes) -> None:
    """Before the engine is made: the student's side, this process's buffers and the method's head."""
    side.load_state_dict(checkpoint["student"])
    _restore_buffers(checkpoint, "buffers", side, processes)
    method.load_state_dict(checkpoint["method"])


def require_same_head(checkpoint: dict[str, Any], method: Method) -> None:
    """Refuses to go on with a student against Gaussians of another head than it was trained with.

    Args:
        method: with the head of the teacher's cache.

    Raises:
        CacheError: the cache was built anew since the checkpoint was written.
    """
    saved, found = checkpoint["method"].get("head"), method.state_dict().get("head")
    if saved is None or found is None:
        return
    differing = [name for name in found if name not in saved or not torch.equal(found[name].cpu(), saved[name].cpu())]
    if differing:
        raise CacheError(
            f"the teacher's cache holds another head than the checkpoint was trained with ({len(differing)} of "
            f"{len(found)} tensors differ, the first is {differing[0]}): it was built anew since; restore that cache, "
            "or start a new run folder with --set run.dir=..."
        )


def restore_average(checkpoint: dict[str, Any], average: nn.Module, processes: Processes) -> None:
    """The exponential average, with this process's buffers."""
    average.load_state_dict(checkpoint["average"])
    _restore_buffers(checkpoint, "average_buffers", average, processes)


def restore_random_state(checkpoint: dict[str, Any], processes: Processes) -> None:
    """Last before training: this process's random states; at another number of processes they start afresh."""
    if checkpoint["world_size"] != processes.world_size:
        return
    rng = checkpoint["processes"][processes.rank]["rng"]
    torch.set_rng_state(rng["cpu"])
    if processes.device.type == "cuda" and rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"], processes.device)


def export_student(plain: nn.Module, path: Path) -> None:
    """The plain network's state dict as safetensors; loads strictly into the same torchvision, timm or zoo model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tensors = {
        k: v.detach().to("cpu", memory_format=torch.contiguous_format, copy=True) for k, v in plain.state_dict().items()
    }
    save_file(tensors, temporary)
    temporary.replace(path)


def import_student(plain: nn.Module, path: Path) -> None:
    """Reads what :func:`export_student` wrote."""
    plain.load_state_dict(load_file(path), strict=True)


@torch.no_grad()
def _restore_buffers(checkpoint: dict[str, Any], key: str, module: nn.Module, processes: Processes) -> None:
    if checkpoint["world_size"] == processes.world_size:
        own = checkpoint["processes"][processes.rank][key]
        for name, buffer in module.named_buffers():
            buffer.copy_(own[name])


def _random_state(device: torch.device) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
