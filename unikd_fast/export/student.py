"""The student of a run: its weights from any of the run's checkpoints, and the plain network with them."""

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unikd_fast.data.roots import expand_weights
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
from unikd_fast.engine.folder import BEST
from unikd_fast.engine.metrics import read_metrics
from unikd_fast.errors import CheckpointError, ConfigError
from unikd_fast.given import find, is_given
from unikd_fast.models import StudentCard, bare_model
from unikd_fast.tasks import best_evaluation

Average = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class StudentWeights:
    """State of a plain network, on the CPU, and a description of where it was found."""

    tensors: dict[str, Tensor]
    origin: str


def read_weights(run: Path, checkpoint: str, average: Average, *, has_average: bool) -> StudentWeights:
    """Read the student of a run that is finished, unfinished or still running. Nothing pickled is read.

    Args:
        run: folder of the run.
        checkpoint: "last", the newest intact checkpoint; "best", that of the best evaluation so far; "step-1200"; or
            the path of a checkpoint folder or of a plain network's .safetensors file.
        average: whether to use the moving average; "auto" uses it if there is one.
        has_average: whether the run has one, which is then what "best" holds.

    Raises:
        ConfigError: there is no such checkpoint, or no such average in it.
        CheckpointError: the checkpoint is damaged.
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
    what = "is neither a checkpoint folder nor a .safetensors file" if path.exists() else "there is no such path"
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
            # The run is still going: it has written a newer one meanwhile, and removed this one.
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
        raise DamagedCheckpoint(f"{path} is not a checkpoint of a run: {type(error).__name__}: {error}") from error
    return StudentWeights(tensors, f"step {step}{', the exponential average' if averaged else ''}")


def _student_of(saved: dict[str, Any]) -> dict[str, Tensor]:
    return _plain(saved["student"], [own["buffers"] for own in saved["processes"]], "network.plain.")


def _average_of(saved: dict[str, Any]) -> dict[str, Tensor]:
    return _plain(saved["average"], [own["average_buffers"] for own in saved["processes"]], "module.plain.")


def _plain(state: dict[str, Tensor], of_processes: list[dict[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    """Return the plain network's part of a state, with running statistics averaged over processes."""
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
        raise DamagedCheckpoint(f"{path} is damaged, or not a safetensors file: {error}") from error


def _require_only_choice(path: Path, average: Average, *, averaged: bool | None) -> None:
    """Refuse --average for a file, which holds one set of weights: an average or not, or None if unknown."""
    if average != "auto" and averaged != (average == "yes"):
        known = {None: "whatever it was made from", True: "the exponential average", False: "the student itself"}
        raise ConfigError(f"--average {average}: {path} holds {known[averaged]} alone; leave --average out")


def _best_step(run: Path) -> str:
    """Return the step of the trainer's best evaluation, in words, if there are metrics."""
    evaluations = [record for record in read_metrics(run) if record["kind"] == "evaluation"]
    if not evaluations:
        return ""
    return f", step {best_evaluation(evaluations)['step']}"


_USUAL_CLASSES = 1000


@dataclass(frozen=True)
class PlainStudent:
    """A plain network in fp32, in eval mode, on the CPU.

    Attributes:
        name: name in a configuration, such as "torchvision/resnet18".
        num_classes: number of classes K.
        network: network with the checkpoint's tensors, bit for bit. Its output may be an object that has the logits.
        logits: the same network, or one around it, whose output is the logits.
        fresh: function that builds the network again, with random weights.
        card: what one must know to use it. If None, it is unknown.
    """

    name: str
    num_classes: int
    network: nn.Module
    logits: nn.Module
    fresh: Callable[[], nn.Module]
    card: StudentCard | None = None

    @property
    def in_words(self) -> dict[str, str]:
        """Return the metadata of its file."""
        return {} if self.card is None else self.card.in_words()


def load_student(
    name: str,
    started_from: str | None,
    tensors: Mapping[str, Tensor],
    *,
    num_classes: int | None,
    model_args: Mapping[str, Any] | None = None,
) -> PlainStudent:
    """Build a student and load its tensors strictly; their shapes give the number of classes.

    Args:
        name: name of the network.
        started_from: student.weights of its run. Published weights are not loaded, but may imply another input size or
            normalisation.
        tensors: state of the network.
        num_classes: first guess, since the data set may know better than the configuration. If None, 1000.
        model_args: student.model_args of its run. If None, there are none.

    Raises:
        ConfigError: there is no such network, or the tensors are not its state.

    Example:
        >>> load_student("torchvision/resnet18", None, load_file("student.safetensors"), num_classes=None).num_classes
        100
    """
    guess = num_classes or _USUAL_CLASSES
    network = _build_plain(name, model_args, started_from, tensors, guess)
    classes = _classes(network, tensors, guess)
    if classes != guess:
        network = _build_plain(name, model_args, started_from, tensors, classes)
    expected = network.state_dict()
    other = [key for key in expected if key in tensors and tensors[key].dtype != expected[key].dtype]
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"the weights are not those of student.model = {name!r}: {error}") from error
    if other:
        raise ConfigError(
            f"the weights are not those of student.model = {name!r}: {other[0]} is {tensors[other[0]].dtype} instead "
            f"of {expected[other[0]].dtype}, and so are {len(other) - 1} more"
        )

    def fresh() -> nn.Module:
        return _for_use(_build_plain(name, model_args, started_from, network.state_dict(), classes))

    return PlainStudent(name, classes, _for_use(network), network, fresh)


def _for_use(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def _classes(network: nn.Module, tensors: Mapping[str, Tensor], guess: int) -> int:
    """Return the number of classes: the size the tensors have where a network of ``guess`` classes has that number."""
    sizes: set[int] = set()
    for name, expected in network.state_dict().items():
        if name in tensors and tensors[name].ndim == expected.ndim:
            pairs = zip(expected.shape, tensors[name].shape, strict=True)
            sizes |= {found for ours, found in pairs if ours == guess != found}
    return sizes.pop() if len(sizes) == 1 else guess


def _build_plain(
    name: str,
    model_args: Mapping[str, Any] | None,
    started_from: str | None,
    tensors: Mapping[str, Tensor],
    num_classes: int,
) -> nn.Module:
    weights = started_from
    if is_given(weights):
        network: nn.Module = copy.deepcopy(find(weights, "student.weights"))
        return network
    if weights is not None:
        with suppress(ValueError):  # a variable that is not set on the exporting machine
            weights = expand_weights("student", weights)
    try:
        return bare_model(
            name, num_classes=num_classes, model_args=model_args, weights=weights, state=tensors, role="student"
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
