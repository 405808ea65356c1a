"""The engine of a run: where it is DeepSpeed's, our settings in its terms; and the optimiser's state by parameter name.

DeepSpeed's own checkpoints depend on the number of processes that wrote them. Ours hold the whole state of each
parameter, so they can be read at any stage.
"""

import copy
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from unikd_fast.config import Config, ConfigError
from unikd_fast.data.sampler import micro_batch_size
from unikd_fast.engine.distributed import Processes, import_deepspeed, join_alone
from unikd_fast.engine.local_engine import LocalEngine
from unikd_fast.engine.optimizer import build_capturable_optimizer, build_optimizer, clip_before_update

if TYPE_CHECKING:
    from unikd_fast.engine.networks import StudentModule


SUPPORTED_STAGES = (0, 1, 2, 3)
_READ_BY_LOOKUP = ("activation_checkpointing", "aio", "checkpoint", "data_types", "flops_profiler", "timers")
"""Sections of DeepSpeed that ignore unknown keys; the others are classes that refuse them."""


def zero_stage(config: Config) -> int:
    """Return the configured ZeRO stage, 0 by default.

    Raises:
        ConfigError: it is not a stage.
    """
    section = config.deepspeed.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise ConfigError(
            f"deepspeed.zero_optimization = {section!r} is not a section; set deepspeed.zero_optimization.stage"
        )
    stage = section.get("stage", 0)
    if stage not in SUPPORTED_STAGES:
        raise ConfigError(
            f"deepspeed.zero_optimization.stage = {stage!r} is not supported; use one of {SUPPORTED_STAGES}"
        )
    return int(stage)


def local_batch_size(config: Config, processes: Processes) -> int:
    """Return the number of samples of a micro-batch on one process.

    Raises:
        ConfigError: the global batch is not divisible by processes times accumulation steps.
    """
    train = config.train
    try:
        return micro_batch_size(train.global_batch_size, processes.world_size, train.accumulation_steps)
    except ValueError as error:
        raise ConfigError(f"train.global_batch_size = {train.global_batch_size}: {error}") from error


def reasons_for_deepspeed(config: Config, processes: Processes) -> Iterator[str]:
    """Yield why a run needs DeepSpeed and not a LocalEngine, each reason with its remedy.

    Raises:
        ConfigError: an unsupported ZeRO stage.
    """
    stage, optimizer = zero_stage(config), config.train.optimizer
    if processes.world_size > 1:
        yield f"{processes.world_size} processes exchange gradients (start one)"
    if stage:
        yield f"deepspeed.zero_optimization.stage = {stage} shards the optimiser (set it to 0)"
    of_zero = config.deepspeed.get("zero_optimization", {}).keys() - {"stage"} if not stage else ()
    further = [*(config.deepspeed.keys() - {"zero_optimization"}), *(f"zero_optimization.{key}" for key in of_zero)]
    if further:
        yield f"deepspeed has {', '.join(sorted(further))} (remove these keys)"
    if optimizer not in ("sgd", "adamw"):
        yield f"train.optimizer = {optimizer!r} is DeepSpeed's, and reads its settings on the host (set sgd or adamw)"


def check_engine(config: Config, processes: Processes) -> None:
    """Refuse settings that the engine of a run would not accept, before anything is made.

    Raises:
        ConfigError: see `deepspeed_config`.
    """
    local_batch_size(config, processes)
    if any(reasons_for_deepspeed(config, processes)):
        deepspeed_config(config, processes)


def deepspeed_config(config: Config, processes: Processes) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the user's section and what our schema defines, each setting once.

    Raises:
        ConfigError: an unsupported ZeRO stage, an indivisible batch, or a key or value that DeepSpeed does not accept.
    """
    zero_stage(config)
    ours: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": local_batch_size(config, processes),
        "gradient_accumulation_steps": config.train.accumulation_steps,
        # Without ZeRO `clip_before_update` clips: DeepSpeed makes the host wait for the device twice.
        "gradient_clipping": config.train.clip_grad_norm if zero_stage(config) else 0.0,
        "steps_per_print": 10**9,  # the metrics are ours
        "zero_allow_untested_optimizer": True,
    }
    if config.train.precision == "bf16":
        # Never bf16.enabled: it casts the parameters, and BatchNorm students crash with it. fp16 is our own.
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    # Unless the user sets them: with offloading DeepSpeed by default refuses torch's optimisers, and its throughput
    # timer makes the host wait for the device twice in every micro-batch.
    defaults = {"zero_force_ds_cpu_optimizer": False, "timers": {"throughput": {"enabled": False}}}
    whole = {**defaults, **config.deepspeed, **ours}
    if config.deepspeed:
        _require_understood(whole, config.deepspeed)
    return whole


class _Watched(dict[str, Any]):
    """A section that records which of its keys are read."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[object] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def _require_understood(whole: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse what DeepSpeed does not understand: it ignores unknown keys, or ends with a traceback."""
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    watched = _Watched(copy.deepcopy(whole))
    for name in _READ_BY_LOOKUP:
        if name in given and not isinstance(given[name], dict):
            raise ConfigError(f"deepspeed.{name} = {given[name]!r} is not a section; set its keys or leave it out")
    del watched["train_batch_size"]  # it follows from the others, over processes that need not have met yet
    inner = {name: _Watched(section) for name, section in watched.items() if name in _READ_BY_LOOKUP}
    watched.update(inner)
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        raise ConfigError("; ".join(dict.fromkeys(_explain(one, given) for one in error.errors()))) from error
    except (AssertionError, DeepSpeedConfigError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"deepspeed: {str(error).partition(chr(10))[0]}; change the value or leave it out") from error
    for key in given:
        if key not in watched.asked:
            raise ConfigError(f"deepspeed.{key} is not read by DeepSpeed; {_nearest(key, watched.asked)}")
    for name, section in inner.items():
        for key in section:
            if key not in section.asked:
                raise ConfigError(f"deepspeed.{name}.{key} is not read by DeepSpeed; {_nearest(key, section.asked)}")


def _explain(error: Any, given: dict[str, Any]) -> str:
    place = [str(part) for part in error["loc"]]
    # The error holds its place within a section, but not which section.
    section = next((name for name, part in given.items() if isinstance(part, dict) and place[0] in part), None)
    path = ".".join(["deepspeed", *filter(None, [section]), *place])
    said = error["msg"].partition("\n")[0].replace("Input should be", "allowed:")
    if error["type"] == "extra_forbidden":
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        fields = DeepSpeedZeroConfig.model_fields if section == "zero_optimization" and len(place) == 1 else {}
        said = f"unknown key; {_nearest(place[-1], fields)}"
    return f"{path} = {error['input']!r} is not valid: {said}"


def _nearest(key: str, known: Iterable[object]) -> str:
    near = difflib.get_close_matches(key, [name for name in known if isinstance(name, str)], n=1)
    return f"the nearest key is {near[0]!r}" if near else "leave it out"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype that the student's operations are cast to, or None for fp32.

    Example:
        >>> autocast_dtype("bf16")
        torch.bfloat16
    """
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def start_engine(config: Config, module: "StudentModule", processes: Processes, *, captured: bool = False) -> Any:
    """Return the engine that trains a module: a LocalEngine, or DeepSpeed's where there is a reason for it.

    Args:
        config: configuration of the run.
        module: the run's student, with its initial weights.
        processes: processes that train it.
        captured: whether steps are captured in a CUDA graph.
    """
    if any(reasons_for_deepspeed(config, processes)):
        return _start_deepspeed(config, module, processes)
    build = build_capturable_optimizer if captured else build_optimizer
    return LocalEngine(module, build(module.parameters(), config.train), config.train)


def _start_deepspeed(config: Config, module: "StudentModule", processes: Processes) -> Any:
    deepspeed = import_deepspeed()
    if processes.world_size == 1 and not dist.is_initialized():
        join_alone(processes.device)
    optimizer = build_optimizer(module.parameters(), config.train)
    if zero_stage(config) == 0:
        clip_before_update(optimizer, config.train.clip_grad_norm)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(config, processes), dist_init_required=False
    )
    if config.train.channels_last and zero_stage(config) == 0:
        # Only now: channels_last parameters crash deepspeed.initialize.
        module.to(memory_format=torch.channels_last)
    if config.train.compile is not None:
        if zero_stage(config) == 3 and module.adapter is not None:
            # It uses its layers' weights without calling the layers, so the compiler would not gather them.
            module.adapter.forward = torch.compiler.disable(module.adapter.forward)
        engine.compile(compile_kwargs={"mode": config.train.compile})
    return engine


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Give every process the whole parameters of a module, to read; at ZeRO stage 3 each process holds a part.

    All processes must enter it.
    """
    parts = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


def collect_optimizer_state(engine: Any) -> dict[str, Any]:
    """Return ``{"tensors": {parameter name: {key: tensor}}, "shared": {key: value}}``; all processes must call it."""
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if not engine.zero_optimization():
        states = {name: engine.optimizer.state.get(p, {}) for name, p in trained.items()}
        tensors = {name: _tensors(state, trained[name].shape) for name, state in states.items()}
        some: dict[str, Any] = next((state for state in states.values() if state), {})
        return {"tensors": tensors, "shared": _shared(some)}
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = _partitions(engine)[0]
    state = engine.optimizer.optimizer.state.get(flat, {})
    keys = list(_tensors(state, flat.shape))
    tensors = {name: {key: safe_get_full_optimizer_state(p, key) for key in keys} for name, p in trained.items()}
    return {"tensors": tensors, "shared": _shared(state)}


def restore_optimizer_state(engine: Any, saved: dict[str, Any]) -> None:
    """Restore the state that `collect_optimizer_state` returned, in a new engine."""
    tensors, shared = saved["tensors"], saved["shared"]
    if not engine.zero_optimization():
        for name, parameter in engine.module.named_parameters():
            if tensors.get(name):
                own = {key: _like(value, parameter) for key, value in tensors[name].items()}
                # A fused optimiser counts its steps on the device.
                device = parameter.device if engine.optimizer.defaults.get("fused") else torch.device("cpu")
                engine.optimizer.state[parameter] = {**own, **_copied(shared, device)}
        return
    if engine.zero_optimization_partition_weights():
        _restore_stage_3(engine, tensors, shared)
    else:
        _restore_stages_1_and_2(engine, tensors, shared)


def _partitions(engine: Any) -> list[Tensor]:
    """Return this process's flat part of each group of parameters."""
    zero = engine.optimizer
    stage_3 = engine.zero_optimization_partition_weights()
    flat: list[Tensor] = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    return flat


def _restore_stages_1_and_2(engine: Any, tensors: dict[str, dict[str, Tensor]], shared: dict[str, Any]) -> None:
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    keys = {key for state in tensors.values() for key in state}
    zero = engine.optimizer
    for group, flat in zip(zero.bit16_groups, _partitions(engine), strict=True):
        state: dict[str, Any] = {key: torch.zeros_like(flat) for key in keys}
        for parameter in group:
            fragment = parameter._hp_mapping  # None: another process owns this parameter's part
            if fragment is None:
                continue
            source, target = fragment.lp_fragment_address, fragment.hp_fragment_address
            for key in keys:
                part = tensors[names[parameter]][key].flatten().narrow(0, source.start, source.numel)
                state[key].narrow(0, target.start, target.numel).copy_(part)
        zero.optimizer.state[flat] = {**state, **_copied(shared)}
        for parameter in group:
            if parameter._hp_mapping is not None:
                parameter._hp_mapping.set_optim_state_fragment(flat, zero.optimizer.state[flat])


def _restore_stage_3(engine: Any, tensors: dict[str, dict[str, Tensor]], shared: dict[str, Any]) -> None:
    """Restore at stage 3, where a parameter is cut into equal parts, one per process, the last ones padded."""
    keys = {key for state in tensors.values() for key in state}
    zero = engine.optimizer
    for flat in _partitions(engine):
        zero.optimizer.state[flat] = {**{key: torch.zeros_like(flat) for key in keys}, **_copied(shared)}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        group, target, _ = zero.grad_position[zero.get_param_id(parameter)]
        state = zero.optimizer.state[_partitions(engine)[group]]
        size = parameter.partition_numel()
        start = size * zero._get_param_partition_rank(parameter)
        for key in keys:
            whole = tensors[name][key].flatten()
            part = whole[start : start + size]
            state[key].narrow(0, target, part.numel()).copy_(part)


def _tensors(state: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """Return the entries with one number per element of the parameter, such as momentum."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == shape and k != "step"}


def _shared(state: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that are the same for every parameter: the step count."""
    return {key: value for key, value in state.items() if key == "step"}


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return torch.empty_like(parameter).copy_(value)


def _copied(shared: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """Return a copy, with tensors on a device. If None, they stay on theirs."""
    return {
        key: value.to(device or value.device, copy=True) if isinstance(value, Tensor) else value
        for key, value in shared.items()
    }
