"""``--dry-run``: what would be trained, how large it is, and how long, without training."""

from torch import nn

from unikd_fast.config import Config
from unikd_fast.config.load import cache_dir
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache_launch import plan_experiment, without_cache
from unikd_fast.engine.header import data_line, method_lines, student_line, teacher_line
from unikd_fast.engine.memory import estimate_memory
from unikd_fast.engine.online_teacher import describe_teacher
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.sharding import deepspeed_config, local_batch_size

MIB = 2**20


def describe(config: Config, processes: Processes) -> str:
    """Models, parameters, feature shapes, batch per process, steps and estimated memory, as text.

    A teacher that the run would train first is described with random weights.
    """
    given, teacher = config, config.teacher
    trained_first = teacher is not None and teacher.weights is None and teacher.training is not None
    if teacher is not None and trained_first:
        config = config.model_copy(update={"teacher": teacher.model_copy(update={"weights": "random"})})
    deepspeed_config(config, processes)  # an unsupported setting must not wait for the real run
    experiment = build_experiment(without_cache(config), processes)
    lines = [data_line(given, experiment), student_line(given, experiment), *_levels(experiment.student)]
    of_teacher = teacher_line(given, experiment)
    if experiment.teacher is not None and experiment.teacher_record is not None and of_teacher is not None:
        record = experiment.teacher_record
        if trained_first:
            record = {**record, "fidelity_skipped": "the run trains the teacher first"}
        lines += [of_teacher, *_levels(experiment.teacher.network), *describe_teacher(record)]
    lines += method_lines(given, experiment, processes)
    lines.append(_memory(experiment, local_batch_size(config, processes), processes))
    if experiment.teacher is not None and teacher is not None and teacher.cache.mode != "off":
        plan = plan_experiment(config, experiment, processes)
        lines.append(f"cache     {teacher.cache.mode} {cache_dir(config)}: {plan.line()}")
    if config.compare is not None:
        runs = len(config.compare.seeds) * len(config.compare.runs)
        lines.append(f"compare   {runs} runs: {', '.join(config.compare.runs)}; seeds {list(config.compare.seeds)}")
    return "\n".join([*lines, f"run.dir   {config.run.dir}"])


def _levels(network: nn.Module) -> list[str]:
    shapes = getattr(network, "level_shapes", ())
    names = getattr(network, "level_names", ())
    return [f"          {name}: {c} x {h} x {w}" for name, (c, h, w) in zip(names, shapes, strict=True)]


def _memory(experiment: Experiment, batch: int, processes: Processes) -> str:
    parts = {name: amount / MIB for name, amount in estimate_memory(experiment, batch, processes).items()}
    detail = ", ".join(f"{name} {mib:,.0f}" for name, mib in parts.items())
    return f"memory    about {sum(parts.values()):,.0f} MiB per process: {detail} (estimate)"
