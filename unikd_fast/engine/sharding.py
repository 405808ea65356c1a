"""Our settings in DeepSpeed's terms, and the engine made from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from unikd_fast.config import Config, ConfigError
from unikd_fast.data.sampler import micro_batch_size
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.schedule import build_optimizer
from unikd_fast.engine.student import StudentSide

SUPPORTED_STAGES = (0, 1, 2, 3)


def zero_stage(config: Config) -> int:
    return int(config.deepspeed.get("zero_optimization", {}).get("stage", 0))


def local_batch_size(config: Config, processes: Processes) -> int:
    """Samples of one micro-batch on one process.

    Raises:
        ConfigError: the global batch does not divide by processes and accumulation steps.
    """
    train = config.train
    try:
        return micro_batch_size(train.global_batch_size, processes.world_size, train.accumulation_steps)
    except ValueError as error:
        raise ConfigError(f"train.global_batch_size = {train.global_batch_size}: {error}") from error


def deepspeed_config(config: Config, processes: Processes) -> dict[str, Any]:
    """The configuration DeepSpeed gets: the user's object and what our schema states, each thing once.

    Raises:
        ConfigError: an unsupported ZeRO stage or an indivisible batch.
    """
    if zero_stage(config) not in SUPPORTED_STAGES:
        raise ConfigError(
            f"deepspeed.zero_optimization.stage = {zero_stage(config)} is not supported; use one of {SUPPORTED_STAGES}"
        )
    ours: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": local_batch_size(config, processes),
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "gradient_clipping": config.train.clip_grad_norm,
        "steps_per_print": 10**9,  # the metrics are ours
        "zero_allow_untested_optimizer": True,
    }
    if config.train.precision == "bf16":
        # Never bf16.enabled: it casts the parameters, and BatchNorm students crash with it. fp16 we see to ourselves.
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    # Unless the user asks for it: with offloading DeepSpeed otherwise refuses torch's optimisers.
    return {"zero_force_ds_cpu_optimizer": False, **config.deepspeed, **ours}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What the student's operations are cast to; None: nothing.

    Example:
        >>> autocast_dtype("bf16")
        torch.bfloat16
    """
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def start_engine(config: Config, module: StudentSide, processes: Processes) -> Any:
    """The DeepSpeed engine that trains ``module``, whose weights are already those to start from."""
    optimizer = build_optimizer(module.parameters(), config.train)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(config, processes), dist_init_required=False
    )
    if config.train.channels_last and zero_stage(config) == 0:
        # Only now: channels_last parameters crash deepspeed.initialize.
        module.to(memory_format=torch.channels_last)
    if config.train.compile is not None:
        if zero_stage(config) == 3 and module.adapter is not None:
            # It uses its layers' weights without calling the layers: the compiler would not see them gathered.
            module.adapter.forward = torch.compiler.disable(module.adapter.forward)
        engine.compile(compile_kwargs={"mode": config.train.compile})
    return engine


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it every process has the whole parameters of a module, to read; at ZeRO stage 3 each has a part of them.

    All processes must enter it.
    """
    parts = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(parts, enabled=bool(parts)):
        yield
