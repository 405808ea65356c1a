"""The processes of a run: how they join, exchange values, stop together, and average their buffers."""

import ctypes
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unikd_fast.errors import ConfigError, RunError, stop_signals

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among all processes of a run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)
    """How long the processes wait for each other."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def from_first(self, action: Callable[[], Result]) -> Result:
        """Run an action on the first process alone, and return its result, or raise its error, on every process.

        Raises:
            RunError: the action's, of the same class.
            ConfigError: another ValueError or an OSError of the action.
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
        """Leave the process group, if there is one, after a successful run."""
        leave_group()


def leave_group() -> None:
    """Destroy the process group, if there is one, and DeepSpeed's references to it, so that another run can follow."""
    if dist.is_initialized():
        comm = sys.modules.get("deepspeed.comm")
        (dist if comm is None or not comm.is_initialized() else comm).destroy_process_group()


def start_processes(timeout_minutes: float = 10.0) -> Processes:
    """Join the processes that deepspeed or torchrun started. One process needs no process group, and makes none.

    The processes of one node listen on the loopback interface (torchrun's own store is torchrun's). Those of several
    nodes listen on the network, where whoever reaches a port can join.

    Args:
        timeout_minutes: how long the processes wait for each other, at the start and in every exchange.

    Raises:
        ConfigError: the other processes did not join.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        reuse_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // (_processes_here() or 1)))
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes(0, 1, local_rank, device, timeout)
        try:
            _join_others(_backend(device), timeout)
        except (dist.DistError, RuntimeError, OSError) as error:
            raise ConfigError(
                f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within {timeout_minutes:g} "
                f"minutes (run.timeout_minutes): {error}; check that all nodes started and can reach this address and "
                "port"
            ) from error
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, device, timeout)


def import_deepspeed() -> Any:
    """Import DeepSpeed and return it, without the devices it would look for and the operators it would compile."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed looks for accelerators, and warns that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # DeepSpeed would compile a shared-memory all-reduce that only its inference uses: half a minute on first use, a
    # lock that a killed process leaves behind, and an exception without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_alone(device: torch.device) -> None:
    """Make the process group of a single process, which DeepSpeed's engine needs, without a socket.

    gloo and NCCL listen even without other processes. torch's group for tests does not: it returns what it is given,
    which is all that a group of one does. In older versions of torch (2.11) its reduce-scatter returns nothing; there
    the usual group is made, which listens on the loopback interface alone.

    Args:
        device: device of the run, which decides the usual group.
    """
    deepspeed = import_deepspeed()
    import torch.testing._internal.distributed.fake_pg  # registers it

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK=os.environ.get("LOCAL_RANK", "0"))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    sent, received = torch.ones(1), torch.zeros(1)
    dist.reduce_scatter_tensor(received, sent)
    if not torch.equal(sent, received):
        dist.destroy_process_group()
        _stay_on_loopback()
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)


def _join_others(backend: str, timeout: timedelta) -> None:
    """Join at the launcher's address, or on the loopback interface if all processes are on one node."""
    deepspeed = import_deepspeed()
    if _processes_here() == int(os.environ["WORLD_SIZE"]):
        _stay_on_loopback()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            store = _loopback_store(timeout)
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed(backend, verbose=False, timeout=timeout)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _stay_on_loopback() -> None:
    """Make the backends listen on the loopback interface, unless the user has named another."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def _loopback_store(timeout: timedelta) -> dist.TCPStore:
    """Return a store on the loopback interface; torch's own listens on all interfaces."""
    host, port, first = "127.0.0.1", int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    listener = None
    if first:
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen()
            listener = listening.detach()
    return dist.TCPStore(host, port, int(os.environ["WORLD_SIZE"]), first, timeout=timeout, master_listen_fd=listener)


def _processes_here() -> int | None:
    """Return how many processes torchrun or DeepSpeed started on this node, or None if it is not known."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0) or None


def reuse_freed_memory() -> None:
    """Make glibc reuse the memory of freed activations instead of returning it to the system after every layer.

    Returned memory comes back as zeroed pages, one fault each: 10 to 20 % of a training step on 2 cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: only larger blocks are mapped one by one
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top of the heap is kept up to this


class StopSignal:
    """Context manager that catches SIGTERM, SIGHUP and SIGINT; `agreed` reports them on all processes at the same step.

    Outside the main thread, where Python catches no signals, there are none.

    Launchers signal one process after another, so a process that acted on its own signal would leave the others waiting
    in a collective. The requests are compared by a small all-reduce in a separate gloo group, started at one step and
    read at the next, without synchronising the device. A second Ctrl-C interrupts at once.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._signal = 0
        self._pending: tuple[Any, torch.Tensor] | None = None
        several = processes.world_size > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=processes.timeout) if several else None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in stop_signals() if threading.current_thread() is threading.main_thread() else ():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def asked(self) -> int:
        """Return the signal that this process received, or 0; for work that the processes do not do in step."""
        return self._signal

    def agreed(self) -> int:
        """Return the signal that any process received before the previous call, or 0; the same on every process."""
        if self._group is None:
            return self._signal
        agreed = 0
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            agreed = int(value)
        value = torch.tensor(self._signal)
        self._pending = (dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value)
        return agreed


_SETTLED = 0.01
"""Share of the initial values below which running averages count as those of the data."""


def initial_share(module: nn.Module) -> tuple[float, int]:
    """Return the largest share of the initial value in any BatchNorm's running average, and after how many batches.

    Example:
        >>> initial_share(nn.BatchNorm2d(3))
        (1.0, 0)
    """
    found = [(0.0, 0)]
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.num_batches_tracked is not None:
            batches = int(norm.num_batches_tracked)
            # Without a momentum it is the mean of all batches.
            share = float(batches == 0) if norm.momentum is None else (1 - norm.momentum) ** batches
            found.append((share, batches))
    return max(found)


def explain_bad_evaluation(cross_entropy: float, network: nn.Module, num_classes: int) -> str | None:
    """Return why an evaluation is worse than chance if BatchNorm's averages are the reason, otherwise None.

    Args:
        cross_entropy: cross-entropy of the evaluation, in nats.
        network: the evaluated network.
        num_classes: number of classes.
    """
    share, batches = initial_share(network)
    if share < _SETTLED or not cross_entropy > 2 * math.log(num_classes):
        return None
    settled = None if share == 1 else math.ceil(round(batches * math.log(_SETTLED) / math.log(share), 6))
    return (
        f"this cross-entropy means little {'yet' if settled is None else f'before batch {settled}'}: evaluation uses "
        "BatchNorm's running averages, which are not those of the data yet"
    )


@torch.no_grad()
def average_buffers(module: nn.Module, processes: Processes) -> None:
    """Replace every floating-point buffer by its mean over all processes, so that they agree bit for bit."""
    if processes.world_size == 1:
        return
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    processes.sum_(flat).div_(processes.world_size)
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
