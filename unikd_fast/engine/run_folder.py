"""The run folder: made once, never overwritten, used by one run at a time, and self-describing."""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unikd_fast.config import Config, ConfigError, config_hash
from unikd_fast.engine.processes import Processes

PACKAGES = ("torch", "triton", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "numpy", "unikd-fast")
RESULT = "result.json"
TEACHER = "teacher.json"


@contextmanager
def open_run_folder(config: Config, processes: Processes, *, resume: bool) -> Iterator[Path]:
    """Makes the run folder, or opens it again with ``resume``, and holds its lock meanwhile.

    Raises:
        ConfigError: on every process: the folder exists and resume is off; it belongs to another configuration; or
            another run holds it.
    """
    folder = Path(config.run.dir)
    lock: Any = None
    problem: str | None = None
    if processes.is_first:
        try:
            _refuse_or_accept(folder, config, resume)
            lock = _lock(folder)
            write_json(folder / "config.json", config.model_dump(mode="json", by_alias=True))
            write_json(folder / "environment.json", environment(processes))
        except ConfigError as error:
            problem = str(error)
    problem = processes.broadcast(problem)
    if problem is not None:
        raise ConfigError(problem)
    try:
        yield folder
    finally:
        if lock is not None:
            lock.close()


def _refuse_or_accept(folder: Path, config: Config, resume: bool) -> None:
    stored_path = folder / "config.json"
    if not stored_path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"run.dir = {folder} is not empty and no run folder; choose another with --set run.dir=..."
            )
        return
    if not resume:
        state = "holds a finished run" if (folder / "report.md").exists() else "holds an unfinished run"
        raise ConfigError(
            f"run.dir = {folder} {state}; continue it (or show its report) with --resume auto, or choose another "
            "folder with --set run.dir=..."
        )
    stored = Config.model_validate_json(stored_path.read_text())
    if config_hash(stored) != config_hash(config):
        differing = _differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))
        raise ConfigError(
            f"run.dir = {folder} was made with another configuration and cannot be resumed with this one: "
            f"{'; '.join(differing)}; choose another folder with --set run.dir=..."
        )


def _differences(stored: Any, given: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(given, dict):
        keys = sorted(stored.keys() | given.keys())
        return [d for k in keys for d in _differences(stored.get(k), given.get(k), f"{path}.{k}" if path else k)]
    return [] if stored == given or path.startswith("run.dir") else [f"{path} was {stored!r}, now {given!r}"]


def _lock(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise ConfigError(
            f"run.dir = {folder} is being written by another run (process {holder}); wait for it or choose another "
            "folder with --set run.dir=..."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def environment(processes: Processes) -> dict[str, Any]:
    """Versions, commit, hardware and command of this run."""
    versions = {package: package_version(package) for package in PACKAGES}
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda if cuda else None,
        "commit": commit(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "world_size": processes.world_size,
    }


def package_version(name: str) -> str | None:
    """Version of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Commit of the source tree, with "-dirty" if it has changes; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / RESULT, result)


def write_teacher(folder: Path, record: dict[str, Any]) -> None:
    """How the teacher of the run in ``folder`` was run, and how faithful it was to itself in fp32."""
    write_json(folder / TEACHER, record)


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
