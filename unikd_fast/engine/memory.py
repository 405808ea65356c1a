"""The memory that a run needs on a device, and remedies for where it is not sufficient."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from unikd_fast.engine.zero import autocast_dtype, zero_stage
from unikd_fast.errors import OutOfMemory, lacks_memory

if TYPE_CHECKING:
    from unikd_fast.engine.build import Experiment


Part = Literal["teacher", "student", "optimiser", "method", "run"]

_REMEDIES: dict[Part, str] = {
    "teacher": "raise train.accumulation_steps, set teacher.precision = auto, or train from a cache of its outputs "
    "(teacher.cache.mode = read_write)",
    "student": "raise train.accumulation_steps, or set train.precision = bf16 or train.activation_checkpointing = true",
    "optimiser": "shard it over more processes (deepspeed.zero_optimization.stage = 1 to 3), or keep it on the CPU "
    "(deepspeed.zero_optimization.offload_optimizer, train.optimizer = cpu_adamw)",
    "method": "lower distill.unikd.width, set distill.unikd.fdp = direct for many classes, or take another method "
    "(distill.method)",
    "run": "raise train.accumulation_steps, shard the student (deepspeed.zero_optimization.stage = 3), set "
    "teacher.precision = auto, or take smaller networks",
}


@contextmanager
def oom_hint(part: Part) -> Iterator[None]:
    """Turn a lack of memory inside the block into an OutOfMemory that names the part and the remedies."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        said = str(error).partition("\n")[0] or "MemoryError"
        raise OutOfMemory(f"out of memory in the {part}'s part: {said}; {_REMEDIES[part]}") from error


OPTIMIZER_STATES = {"sgd": 1, "adamw": 2, "fused_adamw": 2, "cpu_adamw": 2}


class SavedBytes(NamedTuple):
    """Bytes that autograd saves in a forward pass: of the student, and of what the method runs in addition."""

    student: int
    inside: int


def estimate_memory(experiment: "Experiment", batch: int) -> dict[str, float]:
    """Estimate the bytes that each part of a run needs, from sizes, and activations by measuring a few images.

    Args:
        experiment: the run.
        batch: images of a micro-batch.
    """
    config, processes, method = experiment.config, experiment.processes, experiment.method
    shards = processes.world_size if zero_stage(config) else 1
    parameters = 4 * count_parameters(experiment.student_module)
    student, inside = saved_bytes(experiment, batch, processes.device)
    parts = {
        "parameters and gradients": 2 * parameters,
        "optimiser": parameters * OPTIMIZER_STATES[config.train.optimizer] / shards,
        "student's activations": student,
    }
    if inside:
        parts["activations inside the method"] = inside
    if heads := head_parameters(experiment):
        # Their gradients, and the two states of AdamW.
        parts["the teacher's head and its optimiser"] = (2 + OPTIMIZER_STATES["adamw"]) * 4 * heads
    if own := method.device_bytes(batch):
        parts["the method's own"] = own
    if experiment.teacher is not None:
        size = torch.finfo(getattr(experiment.teacher, "dtype", torch.float32)).bits // 8
        parts["teacher"] = size * count_parameters(experiment.teacher)
        shapes = getattr(experiment.teacher.network, "level_shapes", ())
        times = 1 + method.needs.before_activation_of("teacher")
        parts["teacher's features"] = times * size * batch * sum(c * h * w for c, h, w in shapes)
    return parts


def saved_bytes(experiment: "Experiment", batch: int, device: torch.device) -> SavedBytes:
    """Return what autograd saves for a micro-batch, extrapolated from two smaller ones.

    Part of it does not grow with the batch: autocast's copies of the weights.
    """
    few, more = 2, 4
    pairs = zip(*(saved_bytes_of(experiment, images, device) for images in (few, more)), strict=True)
    return SavedBytes(*(round(low + (high - low) / (more - few) * (batch - few)) for low, high in pairs))


def saved_bytes_of(experiment: "Experiment", images: int, device: torch.device) -> SavedBytes:
    """Measure what autograd saves for this many images, without parameters and the teacher's weights."""
    teacher: nn.Module = nn.Identity() if experiment.teacher is None else experiment.teacher
    known = chain(experiment.student_module.parameters(), teacher.parameters(), teacher.buffers())
    counted = {tensor.untyped_storage().data_ptr() for tensor in known}
    total = 0

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:  # which is not taken again as long as the graph lives
            counted.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor.detach()  # itself it would keep the graph that computed it, and so all of this, for ever

    inputs = experiment.task.trial_inputs(experiment.config, experiment.method.needs, images, device)
    autocast = autocast_dtype(experiment.config.train.precision)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(device.type, autocast, enabled=autocast is not None),
    ):
        outputs = experiment.student_module(*inputs)
        student = total
        inside = experiment.method.inside(outputs) if experiment.task.figures.has_logits else None
    kept = SavedBytes(student, total - student)
    del outputs, inside
    return kept


def head_parameters(experiment: "Experiment") -> int:
    """Return the number of parameters that the method trains by its own optimiser, apart from the student's."""
    known = {id(parameter) for parameter in experiment.student_module.parameters()}
    head = experiment.method.head
    of_head = () if head is None else head.module.parameters()
    return sum(parameter.numel() for parameter in of_head if id(parameter) not in known)


def count_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
