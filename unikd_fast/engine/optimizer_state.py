"""The optimiser's state by parameter name: independent of ZeRO stage and number of processes.

DeepSpeed's own checkpoints are tied to the number of processes they were written with. Ours hold the whole state of
each parameter, so they are read back at any stage.
"""

from typing import Any

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor, nn


def collect_optimizer_state(engine: Any) -> dict[str, Any]:
    """``{"tensors": {parameter name: {key: tensor}}, "shared": {key: value}}``; all processes must call it."""
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if not engine.zero_optimization():
        states = {name: engine.optimizer.state.get(p, {}) for name, p in trained.items()}
        tensors = {name: _tensors(state, trained[name].shape) for name, state in states.items()}
        some: dict[str, Any] = next((state for state in states.values() if state), {})
        return {"tensors": tensors, "shared": _shared(some)}
    flat = engine.optimizer.single_partition_of_fp32_groups[0]
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
                engine.optimizer.state[parameter] = {**own, **_copied(shared)}
        return
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    keys = {key for state in tensors.values() for key in state}
    zero = engine.optimizer
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
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


def _tensors(state: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """The entries with one number per element of the parameter: momentum and its like."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == shape and k != "step"}


def _shared(state: dict[str, Any]) -> dict[str, Any]:
    """The entries that are the same for every parameter: the step count."""
    return {key: value for key, value in state.items() if key == "step"}


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    return torch.empty_like(parameter).copy_(value)


def _copied(shared: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in shared.items()}
