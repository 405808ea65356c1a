"""Whether a run's steps can be captured in a CUDA graph (train.cuda_graph), and what is in the way."""

import logging
from collections.abc import Iterator

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.training import OWN_GRAPHS
from unikd_fast.data.device_loader import DeviceLoader
from unikd_fast.data.mixing import MixedLoader
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.sharding import zero_stage

_logger = logging.getLogger("unikd_fast")


def captures(config: Config, experiment: Experiment, processes: Processes) -> bool:
    """Whether the steps of a run are captured; the first process says so, and why not where "auto" decides.

    Raises:
        ConfigError: train.cuda_graph = on, and something is in the way.
    """
    asked = config.train.cuda_graph
    if asked == "off":
        return False
    found = [*device_obstacles(processes), *obstacles(config, experiment, processes)]
    if found and asked == "on":
        raise ConfigError(
            f"train.cuda_graph = 'on', but the step cannot be captured: {'; '.join(found)}; or set it to auto"
        )
    if processes.is_first:
        if found:
            # Without a GPU nobody expects otherwise.
            level = logging.INFO if processes.device.type == "cuda" else logging.DEBUG
            _logger.log(level, "train.cuda_graph: steps are launched operation by operation, because %s", found[0])
        else:
            _logger.info("train.cuda_graph: steps are captured in a CUDA graph and replayed")
    return not found


def device_obstacles(processes: Processes) -> Iterator[str]:
    """A CUDA graph needs CUDA."""
    if processes.device.type != "cuda":
        yield f"the device is {processes.device.type}, no CUDA device (run on a GPU)"


def obstacles(config: Config, experiment: Experiment, processes: Processes) -> Iterator[str]:
    """What else is in the way, each with its remedy, the most general first."""
    train, teacher = config.train, config.teacher
    if processes.world_size > 1:
        yield f"{processes.world_size} processes exchange gradients (start one)"
    if stage := zero_stage(config):
        yield f"deepspeed.zero_optimization.stage = {stage} shards the optimiser (set it to 0)"
    further = sorted(config.deepspeed.keys() - {"zero_optimization"})
    if further:
        yield f"DeepSpeed does not run a captured step, and deepspeed has {', '.join(further)} (remove these keys)"
    if config.run.deepspeed_checkpoints:
        yield "DeepSpeed does not run a captured step, and run.deepspeed_checkpoints = true (set it to false)"
    yield from _loader_obstacles(experiment)
    if train.optimizer not in ("sgd", "adamw"):
        yield f"train.optimizer = {train.optimizer!r} reads its settings on the host (set sgd or adamw)"
    if train.precision == "fp16":
        yield "train.precision = 'fp16' has a loss scale that the host follows (set bf16 or fp32)"
    if train.nonfinite == "skip":
        yield "train.nonfinite = 'skip' makes the host read every gradient's norm (set stop)"
    if train.activation_checkpointing:
        yield "train.activation_checkpointing reads the random state on the host (set it to false)"
    for key, mode in (("train", train.compile), ("teacher", None if teacher is None else teacher.compile)):
        if mode in OWN_GRAPHS:
            yield f"{key}.compile = {mode!r} captures graphs of its own (set null or 'default')"
    if (reason := experiment.method.uncapturable) is not None:
        yield f"{reason} (choose another setting)"


def _loader_obstacles(experiment: Experiment) -> Iterator[str]:
    if experiment.cache is not None:
        yield "the teacher's outputs come from a cache on disk (set teacher.cache.mode = off)"
    loader = experiment.loader
    if isinstance(loader, MixedLoader):
        yield "data.mixing is drawn on the host (set mixup_alpha and cutmix_alpha to 0)"
    elif not isinstance(loader, DeviceLoader):
        yield f"{type(loader).__name__} decodes files on the host (use a data set that fits into the device's memory)"
    elif loader.unplanned is not None:
        yield f"{loader.unplanned} (turn them off in data.augmentation and data.second_view)"
