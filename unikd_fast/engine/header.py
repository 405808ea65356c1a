"""What runs, in a few lines: said before training, and by ``--dry-run`` with the shapes besides."""

from unikd_fast.config import Config
from unikd_fast.config.load import cache_dir
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.memory import count_parameters, head_parameters
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.sharding import local_batch_size, zero_stage


def data_line(config: Config, experiment: Experiment) -> str:
    splits = experiment.splits
    return (
        f"data      {config.data.name}: {len(splits.train)} training samples, {splits.num_classes} classes, "
        f"{config.data.image_size} x {config.data.image_size}"
    )


def student_line(config: Config, experiment: Experiment) -> str:
    role = "network" if config.distill.method == "none" else "student"
    return f"{role}   {config.student.model}: {count_parameters(experiment.student):,} parameters"


def teacher_line(config: Config, experiment: Experiment) -> str | None:
    """None without a teacher."""
    teacher = config.teacher
    if teacher is None or config.distill.method == "none":
        return None
    if experiment.teacher is None:
        return f"teacher   {teacher.model}: outputs of {cache_dir(config)}"
    return (
        f"teacher   {teacher.model}: {count_parameters(experiment.teacher):,} parameters, weights "
        f"{teacher.weights or 'trained first'}"
    )


def method_lines(config: Config, experiment: Experiment, processes: Processes) -> list[str]:
    """The method, the batch and the steps."""
    train, world_size = config.train, processes.world_size
    own = count_parameters(experiment.side) - count_parameters(experiment.student) + head_parameters(experiment)
    beside = f": {own:,} parameters beside the student's" if own else ""
    method = "none, cross-entropy alone" if config.distill.method == "none" else config.distill.label
    return [
        f"method    {method}{beside}",
        f"batch     {train.global_batch_size} = {world_size} process{'es' if world_size > 1 else ''} x "
        f"{local_batch_size(config, processes)} x {train.accumulation_steps} accumulation "
        f"step{'s' if train.accumulation_steps > 1 else ''}, ZeRO stage {zero_stage(config)}, {train.precision}",
        f"steps     {experiment.steps_per_epoch} per epoch, {experiment.total_steps} in all",
    ]


def header(config: Config, experiment: Experiment, processes: Processes) -> list[str]:
    """The lines of a run."""
    lines = [data_line(config, experiment), student_line(config, experiment), teacher_line(config, experiment)]
    return [line for line in lines if line is not None] + method_lines(config, experiment, processes)
