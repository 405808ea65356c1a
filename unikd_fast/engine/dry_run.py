"""``--dry-run``: what would be trained, how large it is, and how long, without training."""

import torch
from torch import nn

from unikd_fast.config import Config
from unikd_fast.config.load import cache_dir
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache_launch import plan_experiment, without_cache
from unikd_fast.engine.online_teacher import describe_teacher
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.sharding import deepspeed_config, local_batch_size, zero_stage

OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}
MIB = 2**20


def describe(config: Config, processes: Processes) -> str:
    """Models, parameters, feature shapes, batch per process, steps and estimated memory, as text.

    A teacher that the run would train first is described with random weights.
    """
    teacher = config.teacher
    if teacher is not None and teacher.weights is None and teacher.training is not None:
        config = config.model_copy(update={"teacher": teacher.model_copy(update={"weights": "random"})})
    deepspeed_config(config, processes)  # an unsupported setting must not wait for the real run
    experiment = build_experiment(without_cache(config), processes)
    batch = local_batch_size(config, processes)
    lines = [
        f"data      {config.data.name}: {len(experiment.splits.train)} training samples, "
        f"{experiment.splits.num_classes} classes, {config.data.image_size} x {config.data.image_size}",
        f"student   {config.student.model}: {_count(experiment.student):,} parameters",
        *_levels(experiment.student),
    ]
    if experiment.teacher is not None and experiment.teacher_record is not None and teacher is not None:
        lines += [
            f"teacher   {teacher.model}: {_count(experiment.teacher):,} parameters, "
            f"weights {teacher.weights or 'trained first'}",
            *_levels(experiment.teacher.network),
            *describe_teacher(experiment.teacher_record),
        ]
    own = _count(experiment.side) - _count(experiment.student)
    lines += [
        f"method    {config.distill.method}: {own:,} parameters beside the student's",
        f"batch     {config.train.global_batch_size} = {processes.world_size} processes x {batch} x "
        f"{config.train.accumulation_steps} accumulation steps, ZeRO stage {zero_stage(config)}, "
        f"{config.train.precision}",
        f"steps     {experiment.steps_per_epoch} per epoch, {experiment.total_steps} in all",
        *_memory(experiment, batch, processes),
    ]
    if experiment.teacher is not None and teacher is not None and teacher.cache.mode != "off":
        plan = plan_experiment(config, experiment, processes)
        lines.append(f"cache     {teacher.cache.mode} {cache_dir(config)}: {plan.line()}")
    if config.compare is not None:
        runs = len(config.compare.seeds) * len(config.compare.runs)
        lines.append(f"compare   {runs} runs: {', '.join(config.compare.runs)}; seeds {list(config.compare.seeds)}")
    return "\n".join([*lines, f"run.dir   {config.run.dir}"])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _levels(network: nn.Module) -> list[str]:
    shapes = getattr(network, "level_shapes", ())
    names = getattr(network, "level_names", ())
    return [f"          {name}: {c} x {h} x {w}" for name, (c, h, w) in zip(names, shapes, strict=True)]


def _memory(experiment: Experiment, batch: int, processes: Processes) -> list[str]:
    """Parameters, gradients and optimiser from their sizes; activations by measuring two images."""
    config = experiment.config
    shards = processes.world_size if zero_stage(config) else 1
    parameters = 4 * _count(experiment.side) / MIB
    optimizer = parameters * OPTIMIZER_STATES[config.train.optimizer] / shards
    activations = _saved_mib_per_image(experiment, processes.device) * batch
    parts = {"parameters and gradients": 2 * parameters, "optimiser": optimizer, "student's activations": activations}
    if experiment.teacher is not None:
        size = torch.finfo(experiment.teacher.dtype).bits // 8
        parts["teacher"] = size * _count(experiment.teacher) / MIB
        shapes = getattr(experiment.teacher.network, "level_shapes", ())
        parts["teacher's features"] = size * batch * sum(c * h * w for c, h, w in shapes) / MIB
    detail = ", ".join(f"{name} {value:,.0f}" for name, value in parts.items())
    return [f"memory    about {sum(parts.values()):,.0f} MiB per process: {detail} (estimate)"]


def _saved_mib_per_image(experiment: Experiment, device: torch.device) -> float:
    """What autograd keeps of a forward pass of the student's side, per image."""
    known = {parameter.untyped_storage().data_ptr() for parameter in experiment.side.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = experiment.config.data.image_size
    images = torch.zeros(2, 3, size, size, device=device)
    bf16 = experiment.config.train.precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        outputs = experiment.side(images)
    del outputs
    return sum(kept.values()) / 2 / MIB
