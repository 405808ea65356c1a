"""The optimiser's state by parameter name: independent of ZeRO stage and number of processes.

DeepSpeed's own checkpoints are tied to the number of processes they were written with. Ours hold the whole state of
each parameter, so they are read back at any stage.
"""

from typing import Any

import torch
from torch import Tensor, nn


def collect_optimizer_state(engine: Any) -> dict[str, Any]:
    """``{"tensors": {parameter name: {key: tensor}}, "shared": {key: value}}``; all processes must call it."""
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
    """Gives a fresh engine the state that :func:`collect_optimizer_state` returned."""
    tensors, shared = saved["tensors"], saved["shared"]
    if not engine.zero_optimization():
        for name, parameter in engine.module.named_parameters():
            if tensors.get(name):
                own = {key: _like(value, parameter) for key, value in tensors[name].items()}
                # A fused optimiser counts its steps where it computes.
                device = parameter.device if engine.optimizer.defaults.get("fused") else torch.device("cpu")
                engine.optimizer.state[parameter] = {**own, **_copied(shared, device)}
        return
    if engine.zero_optimization_partition_weights():
        _restore_stage_3(engine, tensors, shared)
    else:
        _restore_stages_1_and_2(engine, tensors, shared)


def _partitions(engine: Any) -> list[Tensor]:
    """This process's flat part of each group of parameters."""
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
    """A parameter is cut into equal parts, one for each process, of which the last ones may be padded."""
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
    """The entries with one number per element of the parameter: momentum and its like."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == shape and k != "step"}


def _shared(state: dict[str, Any]) -> dict[str, Any]:
    """The entries that are the same for every parameter: the step count."""
    return {key: value for key, value in state.items() if key == "step"}


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return torch.empty_like(parameter).copy_(value)


def _copied(shared: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A copy, of tensors on ``device``; None: where they are."""
    return {
        key: value.to(device or value.device, copy=True) if isinstance(value, Tensor) else value
        for key, value in shared.items()
    }
