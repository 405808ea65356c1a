"""How many runs at a time: by the cores, and on GPUs by their memory and what the first run took of it."""

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from unikd_fast.report.run_files import RunFileError, read_records

_CORES_A_RUN = 2
# Of a run on a GPU beside what it counts itself: the context with its libraries, and what the allocator cannot use.
_CONTEXT_GIB = 0.75
_ALLOCATOR = 1.25
_KEPT_FREE = 0.9

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Gpu(NamedTuple):
    """A GPU, by the name that CUDA_VISIBLE_DEVICES knows it by, and its free memory."""

    name: str
    free_gib: float


class CpuRoom:
    """Room on a machine without a GPU.

    Args:
        jobs: at a time; None for one for two cores.
        cores: of this machine that may be used.
    """

    def __init__(self, jobs: int | None, cores: int) -> None:
        self._jobs = jobs or max(1, cores // _CORES_A_RUN)
        self._threads = max(1, cores // self._jobs)

    def __str__(self) -> str:
        return f"{self._jobs} at a time on the CPU, {self._threads} threads each"

    def offer(self, running: Sequence[Mapping[str, str]]) -> Mapping[str, str] | None:
        if len(running) >= self._jobs:
            return None
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(self._threads)}

    def narrow(self, running: int) -> bool:
        self._jobs = max(1, min(self._jobs - 1, running)) if running else self._jobs
        return running > 0


class GpuRoom:
    """Room on GPUs, each run on one of them.

    Args:
        gpus: at least one.
        jobs: at a time, on all; None for as many as fit, one a GPU until a run has said how much it takes.
        cores: of this machine that may be used; no more than one run for two of them is started by itself.
        memory_gib: the most that a run has taken so far; None while that is not known.
    """

    def __init__(
        self, gpus: Sequence[Gpu], jobs: int | None, cores: int, memory_gib: Callable[[], float | None]
    ) -> None:
        self._gpus, self._jobs, self._memory_gib = gpus, jobs, memory_gib
        self._most = jobs or max(len(gpus), cores // _CORES_A_RUN)

    def __str__(self) -> str:
        own = f"{self._jobs} at a time" if self._jobs else f"as many at a time as fit, {self._most} at most,"
        return f"{own} on {len(self._gpus)} GPU{'s' if len(self._gpus) > 1 else ''}"

    def offer(self, running: Sequence[Mapping[str, str]]) -> Mapping[str, str] | None:
        if len(running) >= self._most:
            return None
        load = {gpu.name: sum(one.get(VISIBLE) == gpu.name for one in running) for gpu in self._gpus}
        gpu = min(self._gpus, key=lambda each: load[each.name])
        if self._jobs is None and load[gpu.name] and load[gpu.name] >= runs_that_fit(gpu.free_gib, self._memory_gib()):
            return None
        return {VISIBLE: gpu.name}

    def narrow(self, running: int) -> bool:
        self._most = max(1, min(self._most - 1, running)) if running else self._most
        return running > 0


def runs_that_fit(free_gib: float, memory_gib: float | None) -> int:
    """How many runs a GPU holds, at least one.

    Args:
        free_gib: of its memory, before the first.
        memory_gib: of tensors that a run takes at most; None if that is not known, and there is room for one.

    Example:
        >>> runs_that_fit(80.0, 2.0)
        22
    """
    if memory_gib is None:
        return 1
    return max(1, int(_KEPT_FREE * free_gib / (_ALLOCATOR * memory_gib + _CONTEXT_GIB)))


def find_gpus() -> list[Gpu]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible; none where nvidia-smi is not there."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(found, os.environ.get(VISIBLE))


def parse_gpus(table: str, visible: str | None) -> list[Gpu]:
    """The GPUs in what nvidia-smi says: index, identifier and free MiB in a line for each.

    Args:
        visible: CUDA_VISIBLE_DEVICES; a device in it that nvidia-smi does not list, such as a part of a GPU, has
            room for one run.
    """
    listed = [[part.strip() for part in line.split(",")] for line in table.splitlines() if line.count(",") == 2]
    gpus = {index: (uuid, float(free) / 1024) for index, uuid, free in listed if free.replace(".", "").isdigit()}
    if visible is None:
        return [Gpu(index, free) for index, (_, free) in gpus.items()]
    named = [name.strip() for name in visible.split(",") if name.strip()]

    def free_gib(name: str) -> float:
        own = [free for index, (uuid, free) in gpus.items() if name == index or uuid.startswith(name)]
        return own[0] if own else 0.0

    return [Gpu(name, free_gib(name)) for name in named]


def largest_memory_gib(folders: Sequence[Path]) -> float | None:
    """The most memory that the runs in these folders say they take; None before the first one has."""
    values: list[float] = []
    for folder in folders:
        try:
            values += [record["memory_gib"] for record in read_records(folder) if "memory_gib" in record]
        except (RunFileError, OSError):
            continue  # it is being written
    return max(values, default=None)
