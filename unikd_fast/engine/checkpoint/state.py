"""What a checkpoint holds of a run, independently of the ZeRO stage and the number of processes.

    student     the StudentModule's parameters and buffers, whole
    optimizer   its state by parameter name
    method      the method's own state
    head        network and optimiser of the method's head, if it has one
    average     the exponential average, if there is one
    processes   per process: its own buffers and random states
    run         step, number of processes, ZeRO stage, seed, loss scale of fp16

The teacher is not part of it. Loss curves continue bit for bit with the same number of processes and stage, and up to
rounding with others; the order of the samples is a function of the step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unikd_fast.engine.checkpoint.files import DamagedCheckpoint, on_cpu, read_folder
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.zero import collect_optimizer_state, gathered
from unikd_fast.errors import CacheError
from unikd_fast.methods import Method


def collect_state(
    *,
    step: int,
    engine: Any,
    method: Method,
    average: nn.Module | None,
    processes: Processes,
    seed: int,
    loss_scale: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the parts of a checkpoint as copies on the CPU, on the first process; all processes must call it.

    Returns:
        Nested state by part; an empty dictionary on the other processes.
    """
    student_module: nn.Module = engine.module
    optimizer = collect_optimizer_state(engine)
    own = {
        "buffers": dict(student_module.named_buffers()),
        "average_buffers": {} if average is None else dict(average.named_buffers()),
        "rng": _random_state(processes.device),
    }
    of_processes = processes.gather(on_cpu(own))
    with gathered(student_module):
        if not processes.is_first:
            return {}
        student = on_cpu(student_module.state_dict())
    return {
        "student": student,
        "optimizer": on_cpu(optimizer),
        "method": on_cpu(method.state_dict()),
        "head": None if method.head is None else on_cpu(method.head.state_dict()),
        "average": None if average is None else on_cpu(average.state_dict()),
        "processes": of_processes,
        "run": {
            "step": step,
            "world_size": processes.world_size,
            "zero_stage": int(engine.zero_optimization_stage()),
            "seed": seed,
            "loss_scale": loss_scale,
        },
    }


def require_usable(path: Path, student_module: nn.Module) -> None:
    """Refuse a checkpoint that is intact but does not hold the state of this network.

    Args:
        path: folder of the checkpoint.
        student_module: the run's student, before it is sharded.

    Raises:
        DamagedCheckpoint: the state does not fit; says what.
    """
    saved = read_folder(path)
    with restoring(path):
        run, of_processes = saved["run"], saved["processes"]
        counts = {key: run[key] for key in ("step", "world_size", "zero_stage", "seed")}
        _require(all(type(value) is int and value >= 0 for value in counts.values()), f"run is {counts}")
        _require(len(of_processes) == run["world_size"], f"{len(of_processes)} processes, {run['world_size']} said")
        _require_like(saved["student"], student_module.state_dict(), "student")
        for own in of_processes:
            _require_like(own["buffers"], dict(student_module.named_buffers()), "buffers of a process")
            _require(own["rng"]["cpu"].dtype == torch.uint8, f"a random state is {own['rng']['cpu'].dtype}")
        parameters = dict(student_module.named_parameters())
        for name, state in saved["optimizer"]["tensors"].items():
            _require_like(state, dict.fromkeys(state, parameters[name]), f"optimizer, {name}")


@contextmanager
def restoring(path: Path, *, advice: str = "") -> Iterator[None]:
    """Name the checkpoint in errors while its state is restored.

    Args:
        path: folder of the checkpoint.
        advice: remedy, for the message.

    Raises:
        DamagedCheckpoint: the state does not fit this run.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise DamagedCheckpoint(
            f"{path} does not hold the state of this run: {said}{advice and '; '}{advice}"
        ) from error


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise ValueError(found)


def _require_like(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    differing = sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or found[name].shape != expected[name].shape
    )
    _require(not differing, f"{what}: {len(differing)} tensors differ in name or shape, the first is {differing[:1]}")


def restore_weights(saved: dict[str, Any], student_module: nn.Module, method: Method, processes: Processes) -> None:
    """Restore the student, this process's buffers, the method's state and its head, before the engine is made."""
    student_module.load_state_dict(saved["student"])
    _restore_buffers(saved, "buffers", student_module, processes)
    method.load_state_dict(saved["method"])
    if method.head is not None:
        method.head.load_state_dict(saved["head"])


def require_same_head(saved: dict[str, Any], method: Method) -> None:
    """Refuse to continue with Gaussians of another head than the student was trained with.

    Args:
        saved: the checkpoint.
        method: method with the head of the teacher's cache.

    Raises:
        CacheError: the cache was rebuilt after the checkpoint was written.
    """
    if method.head is None:
        return
    before, found = saved["head"]["module"], method.head.module.state_dict()
    differing = [name for name in found if name not in before or not torch.equal(found[name].cpu(), before[name].cpu())]
    if differing:
        raise CacheError(
            f"the teacher's cache holds another head than the checkpoint was trained with ({len(differing)} of "
            f"{len(found)} tensors differ, the first is {differing[0]}): it was rebuilt since; restore that cache, "
            "or start a new run folder with --set run.dir=..."
        )


def restore_average(saved: dict[str, Any], average: nn.Module, processes: Processes) -> None:
    """Restore the exponential average, with this process's buffers."""
    average.load_state_dict(saved["average"])
    _restore_buffers(saved, "average_buffers", average, processes)


def restore_random_state(saved: dict[str, Any], processes: Processes) -> None:
    """Restore this process's random states, last before training; another number of processes starts afresh."""
    if saved["run"]["world_size"] != processes.world_size:
        return
    rng = saved["processes"][processes.rank]["rng"]
    torch.set_rng_state(rng["cpu"])
    if processes.device.type == "cuda" and rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"], processes.device)


@torch.no_grad()
def _restore_buffers(saved: dict[str, Any], key: str, module: nn.Module, processes: Processes) -> None:
    """Restore the process's own buffers, or with another number of processes the mean of all."""
    of_processes = [part[key] for part in saved["processes"]]
    for name, buffer in module.named_buffers():
        if saved["run"]["world_size"] == processes.world_size:
            buffer.copy_(of_processes[processes.rank][name])
        elif buffer.is_floating_point():
            buffer.copy_(mean_buffer(of_processes, name))


def mean_buffer(of_processes: list[dict[str, Tensor]], name: str) -> Tensor:
    """Return a floating-point buffer averaged over the processes that saved it, as before every evaluation."""
    mean = torch.stack([own[name].double() for own in of_processes]).mean(0)
    return mean.to(of_processes[0][name].dtype)


def _random_state(device: torch.device) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
