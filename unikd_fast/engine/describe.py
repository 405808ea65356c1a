"""What a run trains: in a few lines before training, and in full for ``--dry-run``."""

import logging

from torch import nn

from unikd_fast.config import Config
from unikd_fast.config.effect import unreached_steps
from unikd_fast.config.load import cache_dir
from unikd_fast.config.schema import StudentConfig, TeacherConfig
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache_commands import plan_experiment, without_cache
from unikd_fast.engine.checked_teacher import describe_teacher
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.memory import count_parameters, estimate_memory, head_parameters
from unikd_fast.engine.zero import check_engine, local_batch_size, zero_stage

_logger = logging.getLogger("unikd_fast")


def data_line(config: Config, experiment: Experiment) -> str:
    splits = experiment.splits
    without = f", {splits.unlabelled} of them without a label" if splits.unlabelled else ""
    return (
        f"data      {config.data.name}: {len(splits.train)} training samples{without}, {splits.num_classes} classes, "
        f"{experiment.task.size_in_words(config)}"
    )


def student_line(config: Config, experiment: Experiment) -> str:
    role = "network" if config.distill.method == "none" else "student"
    return (
        f"{role}   {config.student.model}: {count_parameters(experiment.student):,} parameters{_size(config.student)}"
    )


def teacher_line(config: Config, experiment: Experiment) -> str | None:
    """Return the line of the teacher, or None without a teacher."""
    teacher = config.teacher
    if teacher is None or config.distill.method == "none":
        return None
    if experiment.teacher is None:
        return f"teacher   {teacher.label}: outputs of {cache_dir(config)}"
    return (
        f"teacher   {teacher.label}: {count_parameters(experiment.teacher):,} parameters, weights "
        f"{teacher.all_weights}{_size(teacher)}"
    )


def _size(section: StudentConfig | TeacherConfig) -> str:
    size = section.image_size
    return "" if size is None else f", images resized to {size} x {size}"


def method_lines(config: Config, experiment: Experiment) -> list[str]:
    """Return the method, the batch and the steps."""
    train, processes = config.train, experiment.processes
    world_size = processes.world_size
    own = (
        count_parameters(experiment.student_module) - count_parameters(experiment.student) + head_parameters(experiment)
    )
    beside = f": {own:,} parameters beside the student's" if own else ""
    method = "none, cross-entropy alone" if config.distill.method == "none" else config.distill.label
    return [
        f"method    {method}{beside}",
        f"batch     {train.global_batch_size} = {world_size} process{'es' if world_size > 1 else ''} x "
        f"{local_batch_size(config, processes)} x {train.accumulation_steps} accumulation "
        f"step{'s' if train.accumulation_steps > 1 else ''}, ZeRO stage {zero_stage(config)}, {train.precision}",
        f"steps     {experiment.steps_per_epoch} per epoch, {experiment.total_steps} in all",
        *(f"          {said}" for said in unreached_steps(train, experiment.total_steps)),
    ]


def log_run(experiment: Experiment, name: str) -> None:
    """Log what a run trains, and warn if the fidelity of its teacher is not checked.

    Args:
        experiment: the run.
        name: label used in log messages.
    """
    config, record = experiment.config, experiment.teacher_record
    lines = [data_line(config, experiment), student_line(config, experiment), teacher_line(config, experiment)]
    _logger.info("[%s] trains %s", name, config.student.model)
    for line in [line for line in lines if line is not None] + method_lines(config, experiment):
        _logger.info("  %s", line)
    if record is None or config.teacher is None:
        return
    record = record.get("teacher", record)  # of one whose outputs are cached
    unchecked = config.teacher.weights == "random" or config.teacher.fidelity.batches == 0
    if record.get("fidelity") is None and unchecked:
        _logger.warning("the teacher's fidelity is not checked: %s", record["fidelity_skipped"])


MIB = 2**20


def describe(config: Config, processes: Processes) -> str:
    """Return models, parameters, feature shapes, batch per process, steps and estimated memory, as text.

    A teacher that the run would train first is described with the weights it starts from.
    """
    given, teacher = config, config.teacher
    trained_first = teacher is not None and teacher.is_trained
    if teacher is not None and trained_first and teacher.weights is None:
        config = config.model_copy(update={"teacher": teacher.model_copy(update={"weights": "random"})})
    check_engine(config, processes)  # as the run would
    experiment = build_experiment(without_cache(config), processes)
    lines = [data_line(given, experiment), student_line(given, experiment), *_levels(experiment.student)]
    of_teacher = teacher_line(given, experiment)
    if experiment.teacher is not None and experiment.teacher_record is not None and of_teacher is not None:
        record = experiment.teacher_record
        if trained_first:
            record = {**record, "fidelity_skipped": "the run trains the teacher first"}
        lines += [of_teacher, *_levels(experiment.teacher.network), *describe_teacher(record)]
    lines += method_lines(given, experiment)
    lines.append(_memory(experiment))
    if experiment.teacher is not None and teacher is not None and teacher.cache.mode != "off":
        plan = plan_experiment(config, experiment)
        lines.append(f"cache     {teacher.cache.mode} {cache_dir(config)}: {plan.line()}")
    if config.compare is not None:
        runs = len(config.compare.seeds) * len(config.compare.runs)
        lines.append(f"compare   {runs} runs: {', '.join(config.compare.runs)}; seeds {list(config.compare.seeds)}")
    return "\n".join([*lines, f"run.dir   {config.run.dir}"])


def _levels(network: nn.Module) -> list[str]:
    shapes = getattr(network, "level_shapes", ())
    names = getattr(network, "level_names", ())
    return [
        f"          {name}: {c} x {h} x {w}" if h else f"          {name}: {c} channels"
        for name, (c, h, w) in zip(names, shapes, strict=True)
    ]


def _memory(experiment: Experiment) -> str:
    batch = local_batch_size(experiment.config, experiment.processes)
    parts = {name: amount / MIB for name, amount in estimate_memory(experiment, batch).items()}
    detail = ", ".join(f"{name} {mib:,.0f}" for name, mib in parts.items())
    return f"memory    about {sum(parts.values()):,.0f} MiB per process: {detail} (estimate)"
