"""The weights of a student in a checkpoint of its run, whichever it is, under the names of the plain network."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unikd_fast.config import ConfigError
from unikd_fast.engine.checkpoint import (
    FOLDER,
    DamagedCheckpoint,
    checkpoint_name,
    complete_checkpoints,
    find_newest,
    read_folder,
)
from unikd_fast.engine.checkpoint.files import check_folder
from unikd_fast.engine.checkpoint.state import mean_buffer
from unikd_fast.engine.export import BEST
from unikd_fast.engine.metrics import read_metrics
from unikd_fast.engine.student_result import best_evaluation
from unikd_fast.errors import CheckpointError

Average = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class StudentWeights:
    """A plain network's state, on the CPU, and where it was found, in words."""

    tensors: dict[str, Tensor]
    origin: str


def read_weights(run: Path, checkpoint: str, average: Average, *, has_average: bool) -> StudentWeights:
    """Reads the student of a run that is finished, unfinished or still going on. Nothing pickled is read.

    Args:
        run: its folder.
        checkpoint: "last", the newest that is whole; "best", of the best evaluation so far; "step-1200"; or the path of
            a checkpoint's folder or of a plain network's .safetensors file.
        average: take the exponential average; "auto": if there is one.
        has_average: whether the run has one, which is then what "best" holds.

    Raises:
        ConfigError: there is no such checkpoint, or no such average in it.
        CheckpointError: it is damaged.
    """
    if checkpoint == "last":
        return _newest(run, average)
    if checkpoint == "best":
        _require_only_choice(run / BEST, average, averaged=has_average)
        return StudentWeights(_read_plain(run / BEST), f"the best evaluation so far{_best_step(run)}")
    if re.fullmatch(r"step-\d+", checkpoint):
        path = run / FOLDER / checkpoint_name(int(checkpoint.removeprefix("step-")))
        if not path.is_dir():
            there = sorted(found.name for found in complete_checkpoints(run))
            raise ConfigError(
                f"--checkpoint {checkpoint}: no {path}; there {'are ' + ', '.join(there) if there else 'is none'}"
            )
        return _checked(path, average)
    path = Path(checkpoint)
    if path.is_dir():
        return _checked(path, average)
    if path.is_file() and path.suffix == ".safetensors":
        _require_only_choice(path, average, averaged=None)
        return StudentWeights(_read_plain(path), str(path))
    what = "is neither a checkpoint's folder nor a .safetensors file" if path.exists() else "there is no such path"
    raise ConfigError(
        f"--checkpoint {checkpoint}: {what}; give last, best, step-<number>, the folder of a checkpoint or a "
        ".safetensors file of a plain network (pickled files are not read)"
    )


def _newest(run: Path, average: Average) -> StudentWeights:
    while (path := find_newest(run)) is not None:
        try:
            return _from_folder(path, average)
        except DamagedCheckpoint:
            if find_newest(run) == path:
                raise
            # The run goes on: it has written a newer one meanwhile, and removed this one.
    finished = run / "student.safetensors"
    remedy = f"give --checkpoint {finished}" if finished.exists() else "none has been written yet"
    raise CheckpointError(f"no checkpoint in {run / FOLDER}; {remedy}")


def _checked(path: Path, average: Average) -> StudentWeights:
    check_folder(path)
    return _from_folder(path, average)


def _from_folder(path: Path, average: Average) -> StudentWeights:
    saved = read_folder(path)
    try:
        averaged = saved["average"] is not None
        if average == "yes" and not averaged:
            raise ConfigError(f"--average yes: {path} has none, because train.ema_decay was null; leave it out")
        averaged = averaged and average != "no"
        tensors = _average_of(saved) if averaged else _student_of(saved)
        step = int(saved["run"]["step"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} is no checkpoint of a run: {type(error).__name__}: {error}") from error
    return StudentWeights(tensors, f"step {step}{', the exponential average' if averaged else ''}")


def _student_of(saved: dict[str, Any]) -> dict[str, Tensor]:
    return _plain(saved["student"], [own["buffers"] for own in saved["processes"]], "network.plain.")


def _average_of(saved: dict[str, Any]) -> dict[str, Tensor]:
    return _plain(saved["average"], [own["average_buffers"] for own in saved["processes"]], "module.plain.")


def _plain(state: dict[str, Tensor], of_processes: list[dict[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    """The plain network's part of a state; running statistics are the mean over processes, as in every evaluation."""
    found = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    for name in found.keys() & of_processes[0].keys():
        if found[name].is_floating_point():
            found[name] = mean_buffer(of_processes, name)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _read_plain(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no {path}: nothing has been evaluated yet; give --checkpoint last")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path} is damaged, or no safetensors file: {error}") from error


def _require_only_choice(path: Path, average: Average, *, averaged: bool | None) -> None:
    """One file holds one set of weights; ``averaged``: whether it is an average, None: unknown."""
    if average != "auto" and averaged != (average == "yes"):
        known = {None: "whatever it was made from", True: "the exponential average", False: "the student itself"}
        raise ConfigError(f"--average {average}: {path} holds {known[averaged]} alone; leave --average out")


def _best_step(run: Path) -> str:
    """The step of the evaluation that the trainer counts as the best, where the metrics are there."""
    evaluations = [record for record in read_metrics(run) if record["kind"] == "evaluation"]
    if not evaluations:
        return ""
    return f", step {best_evaluation(evaluations)['step']}"
