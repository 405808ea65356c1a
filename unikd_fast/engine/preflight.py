"""Checks before training: which nodes, processes and devices were started, and that all processes agree."""

import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from unikd_fast.config import Config, ConfigError, config_hash
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.folder import commit, package_version

_NODE = ("GROUP_RANK", "CROSS_RANK", "SLURM_NODEID")  # torchrun's, DeepSpeed's and SLURM's number of this node


def describe_launch(config: Config, processes: Processes) -> str:
    """Return a line about processes, nodes, devices and backend; all processes must call it.

    Raises:
        ConfigError: on every process: the number of nodes is not `run.nodes`.
    """
    own = (os.environ.get(next((name for name in _NODE if name in os.environ), ""), ""), socket.gethostname())
    found = processes.gather((own, _device_name(processes.device)))
    nodes = list(dict.fromkeys(node for node, _ in found))
    if config.run.nodes is not None and len(nodes) != config.run.nodes:
        raise ConfigError(
            f"run.nodes = {config.run.nodes}, and the launcher started processes on {len(nodes)}: "
            f"{', '.join(host for _, host in nodes)}; check the hostfile or --nnodes, or set run.nodes"
        )
    devices = sorted({device for _, device in found})
    backend = [dist.get_backend()] if len(found) > 1 and dist.is_initialized() else []
    where = ", ".join(
        f"{host} (processes {_ranges([rank for rank, (at, _) in enumerate(found) if at == (number, host)])})"
        for number, host in nodes
    )
    return (
        f"launched {processes.world_size} process{'es' if processes.world_size > 1 else ''} on {len(nodes)} "
        f"node{'s' if len(nodes) > 1 else ''}: {where}; {'; '.join([', '.join(devices), *backend])}"
    )


def program_facts(config: Config) -> dict[str, Any]:
    """Return the configuration, code and versions of this process, for `require_agreement`."""
    return {
        "configuration": config_hash(config),
        "deepspeed section": repr(config.deepspeed),
        "unikd_fast": f"{package_version('unikd-fast')}, commit {commit()}",
        "torch": torch.__version__,
        "deepspeed": package_version("deepspeed"),
        "python": ".".join(map(str, sys.version_info[:2])),
    }


def require_agreement(processes: Processes, facts: Mapping[str, Any]) -> None:
    """Check that all processes would do the same; all must call it.

    Args:
        processes: processes of the run.
        facts: what must be the same on all of them, by name.

    Raises:
        ConfigError: on every process: names each fact that differs, with the processes and their values.
    """
    of_processes = processes.gather(dict(facts))
    differing: list[str] = []
    for name in facts:
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(of_processes):
            ranks.setdefault(str(theirs.get(name)), []).append(rank)
        if len(ranks) > 1:
            said = ", ".join(f"{value} on {_ranges(those)}" for value, those in ranks.items())
            differing.append(f"{name} is {said}")
    if differing:
        raise ConfigError(
            f"the processes do not agree: {'; '.join(differing)}; start all with one configuration, one version of the "
            "code and the same data"
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers as ranges.

    Example:
        >>> _ranges([0, 1, 2, 5])
        '0-2, 5'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
