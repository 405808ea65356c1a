"""The run folder: made once, never overwritten, used by one run at a time, and self-describing.

config.json           the configuration; a folder that has it is a run folder
environment.json      what the run was first started with; written once
starts.jsonl          a line for each further start
result.json           figures of a run that is finished
student.safetensors   the student alone, which loads into the plain model
.lock                 held while the run is in progress
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from unikd_fast.config import Config, ConfigError, config_hash
from unikd_fast.config.load import read_stored
from unikd_fast.engine.distributed import Processes
from unikd_fast.errors import FileError
from unikd_fast.io import (
    append_line,
    is_leftover,
    make_folder,
    naming,
    open_own,
    read_json,
    remove_leftovers,
    write_file,
    write_json,
)
from unikd_fast.models import StudentCard, options_in_words
from unikd_fast.tasks import figures_of

PACKAGES = ("torch", "triton", "torchvision", "timm", "deepspeed", "nvidia-dali-cuda130", "numpy", "unikd-fast")
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
STARTS = "starts.jsonl"
RESULT = "result.json"
TEACHER = "teacher.json"
REPORT = "report.md"
VALIDATION = "validation"  # in the teacher's record: its figures on that split
_LOCK = ".lock"
_BEFORE_THE_CONFIG = {_LOCK, ENVIRONMENT}
_OF_A_START = ("time", "command", "commit", "versions", "world_size")


@contextmanager
def open_run_folder(config: Config, processes: Processes, *, resume: bool) -> Iterator[Path]:
    """Make the run folder, or open it again with ``resume``, and hold its lock meanwhile.

    Raises:
        ConfigError: on every process: the folder exists and resume is off, belongs to another configuration, or is in
            use by another run.
    """
    folder = Path(config.run.dir)
    locks: list[BinaryIO] = []

    def make() -> None:
        try:
            _refuse_or_accept(folder, config, resume)
            make_folder(folder)
        except FileError as error:
            raise ConfigError(f"run.dir = {error}") from error
        locks.append(_lock(folder))
        remove_leftovers(folder)
        _record_start(folder, config, environment(processes))

    try:
        processes.from_first(make)
        yield folder
    finally:
        for lock in locks:
            lock.close()


def _record_start(folder: Path, config: Config, start: dict[str, Any]) -> None:
    """Write the configuration last, so that a folder that a full disk left without it counts as new."""
    is_new = not (folder / CONFIG).exists()
    if is_new or not (folder / ENVIRONMENT).exists():
        write_json(folder / ENVIRONMENT, start)
    else:
        append_line(folder / STARTS, json.dumps({key: start[key] for key in _OF_A_START}))
    write_json(folder / CONFIG, config.model_dump(mode="json", by_alias=True))


def _refuse_or_accept(folder: Path, config: Config, resume: bool) -> None:
    with naming(folder):
        is_new = not (folder / CONFIG).exists()
        found = {path.name for path in folder.iterdir()} if is_new and folder.exists() else set()
    if is_new:
        if any(name not in _BEFORE_THE_CONFIG and not is_leftover(name) for name in found):
            raise ConfigError(
                f"run.dir = {folder} is not empty and not a run folder; choose another with --set run.dir=..."
            )
        return
    if not resume:
        state = "holds a finished run" if (folder / REPORT).exists() else "holds an unfinished run"
        raise ConfigError(
            f"run.dir = {folder} {state}; continue it (or show its report) with --resume auto, or choose another "
            "folder with --set run.dir=..."
        )
    require_same_config(folder, config)


def require_same_config(folder: Path, config: Config) -> None:
    """Compare a configuration with that of a run folder.

    Raises:
        ConfigError: they differ (every difference is named), or the folder's cannot be read.
    """
    stored = read_stored(folder / CONFIG)
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


def _lock(folder: Path) -> BinaryIO:
    lock = open_own(folder / _LOCK)
    try:
        with naming(folder / _LOCK):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = lock.read().decode(errors="replace").strip()
                raise ConfigError(
                    f"run.dir = {folder} is being written by another run (process {holder}); wait for it or choose "
                    "another folder with --set run.dir=..."
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()).encode())
    except BaseException:
        lock.close()
        raise
    return lock


def environment(processes: Processes) -> dict[str, Any]:
    """Return time, versions, commit, hardware and command of this start."""
    versions = {package: package_version(package) for package in PACKAGES}
    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
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
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit of the source tree, with "-dirty" if it has changes, or "unknown" outside a checkout."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command, here = ["git", *arguments], file.parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an environment may lie in the checkout of another project
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run, or None if there is none.

    Raises:
        FileError: the file is damaged; names it.
    """
    return _read_made(folder / RESULT, "which makes it again from the last checkpoint", _is_result)


def _read_made(path: Path, how: str, is_made: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        found = read_json(path)
        if not is_made(found):
            raise FileError(f"{path} is damaged: it does not hold what a run writes")
    except FileNotFoundError:
        return None
    except FileError as error:
        raise FileError(f"{error}; remove it and continue with --resume auto, {how}") from error
    return found


def _is_result(found: dict[str, Any]) -> bool:
    parts = [found.get("best"), found.get("last")]
    names = [found.get("label"), found.get("model")]
    return (
        {"seed", "test_is_val"} <= found.keys()
        and all(isinstance(name, str) for name in names)
        and all(isinstance(part, dict) and "epoch" in part and _has_figures(part.get("test")) for part in parts)
    )


def _is_teacher(found: dict[str, Any]) -> bool:
    figures = found.get(VALIDATION)
    if figures is None:
        return True
    main = figures_of(figures).main if isinstance(figures, dict) else ""
    return _has_numbers(figures, main, "samples") and figures["samples"] > 0


def _has_figures(found: Any) -> bool:
    return isinstance(found, dict) and _has_numbers(found, *figures_of(found).required)


def _has_numbers(found: Any, *keys: str) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), int | float) for key in keys)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / RESULT, result)


def read_teacher(folder: Path) -> dict[str, Any] | None:
    """Return what `write_teacher` wrote, or None if there is none.

    Raises:
        FileError: the file is damaged; names it.
    """
    return _read_made(folder / TEACHER, "which writes it again", _is_teacher)


def write_teacher(folder: Path, record: dict[str, Any]) -> None:
    """Write how the teacher of a run was run, and its fidelity to itself in fp32."""
    write_json(folder / TEACHER, record)


def student_result(
    config: Config,
    *,
    label: str,
    steps: int,
    splits: Any,
    best: tuple[Mapping[str, Any], Mapping[str, Any]],
    last: tuple[Mapping[str, Any], Mapping[str, Any]],
    weights: Path,
) -> dict[str, Any]:
    """Return the content of result.json.

    Args:
        config: configuration of the run.
        label: name of the run in tables.
        steps: number of training steps.
        splits: data that it was trained on.
        best, last: metrics of an evaluation on the validation split and on the test split.
        weights: file of the last student.
    """

    def figures(of: tuple[Mapping[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
        val, test = of
        known = figures_of(test)
        return {
            "epoch": val["epoch"],
            "val": {name: val[name] for name in known.all if name in val},
            "test": {name: test[name] for name in (*known.all, known.by_class) if name in test},
        }

    return {
        "label": label,
        "seed": config.run.seed,
        "method": config.distill.label,
        "model": config.student.model,
        "steps": steps,
        "test_is_val": splits.test_is_val,
        **({"unlabelled": splits.unlabelled} if splits.unlabelled else {}),
        "best": figures(best),
        "last": figures(last),
        "weights": str(weights),
    }


BEST = Path("checkpoints") / "best.safetensors"
STUDENT = Path("student.safetensors")


def export_student(plain: nn.Module, path: Path, card: StudentCard | None = None) -> None:
    """Write a network's state dict as safetensors, which load strictly into the torchvision, timm or cifar model.

    Args:
        plain: the network.
        path: file to write.
        card: what one must know to use it, stored in the file's metadata. If None, nothing is.

    Raises:
        FileError: the disk is full, or cannot be written to.
    """
    make_folder(path.parent)
    tensors = {
        k: v.detach().to("cpu", memory_format=torch.contiguous_format, copy=True) for k, v in plain.state_dict().items()
    }
    metadata = (options_in_words(plain) or {}) | ({} if card is None else card.in_words())
    write_file(path, save(tensors, metadata or None))


def import_student(plain: nn.Module, path: Path) -> None:
    """Read what `export_student` wrote.

    Raises:
        FileError: the file is missing or damaged.
    """
    try:
        plain.load_state_dict(load_file(path), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        said = str(error).partition("\n")[0]
        raise FileError(f"{path} cannot be read: {said}; restore it, or start a new run folder") from error
