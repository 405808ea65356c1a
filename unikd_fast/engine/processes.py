"""The processes of a run: who they are, where they compute, and the few things they say to each other."""

import ctypes
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unikd_fast.errors import ConfigError, RunError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    patience: timedelta = timedelta(minutes=10)
    """How long they wait for each other."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums ``tensor`` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's ``value`` on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def from_first(self, action: Callable[[], Result]) -> Result:
        """What ``action`` gives on the first process, which alone runs it; what it raises there is raised on all.

        Raises:
            RunError: of the action's kind.
            ConfigError: any other ValueError or OSError of the action.
        """
        outcome: tuple[Any, type[RunError] | None, str] | None = None
        if self.is_first:
            try:
                outcome = (action(), None, "")
            except (RunError, ValueError, OSError) as error:
                kind = type(error) if isinstance(error, RunError) else ConfigError
                outcome = (None, kind, str(error))
        value, kind, message = self.broadcast(outcome)
        if kind is not None:
            raise kind(message)
        result: Result = value
        return result

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends the process group after a run that went well."""
        dist.destroy_process_group()


def start_processes(timeout_minutes: float = 10.0) -> Processes:
    """Joins the process group that deepspeed, torchrun or plain python started (the last: a group of one).

    Args:
        timeout_minutes: how long the processes wait for each other, at the start and in every exchange.

    Raises:
        ConfigError: the others did not come.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        reuse_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    import deepspeed

    # DeepSpeed would compile a shared-memory all-reduce that only its inference uses: half a minute on first use, a
    # lock that a killed process leaves behind, and an exception without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        waiting = timedelta(minutes=timeout_minutes)
        try:
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False, timeout=waiting)
        except (dist.DistError, RuntimeError) as error:
            raise ConfigError(
                f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within {timeout_minutes:g} minutes "
                f"(run.timeout_minutes): {error}; see whether all nodes started, and reach this address and port"
            ) from error
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, device, timedelta(minutes=timeout_minutes))


def reuse_freed_memory() -> None:
    """Makes glibc reuse the memory of freed activations instead of returning it to the system after every layer.

    Returned memory comes back as zeroed pages, one fault each: 10 to 20 % of a training step on 2 cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: only larger blocks are mapped one by one
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top of the heap is kept up to this


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
