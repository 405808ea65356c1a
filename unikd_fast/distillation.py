"""The front door for Python: a whole run with networks and data sets that are given as objects."""

import copy
import functools
import itertools
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import sha256
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from unikd_fast.config import ConfigError, parse_config
from unikd_fast.config.load import assign
from unikd_fast.config.schema import LossConfig, RunConfig, TrainConfig
from unikd_fast.data.datasets import digest, first_size, load_datasets
from unikd_fast.data.settings import DataSettings
from unikd_fast.engine.distributed import Processes, start_processes
from unikd_fast.engine.folder import STUDENT, import_student, read_result
from unikd_fast.engine.networks import check_forward
from unikd_fast.engine.run import launch
from unikd_fast.given import PREFIX, giving
from unikd_fast.methods import METHODS
from unikd_fast.models import LogitsOnly
from unikd_fast.teacher.cache.key import hash_tensors

_SECTIONS: dict[str, Any] = {"train": TrainConfig, "loss": LossConfig, "run": RunConfig, "data": DataSettings}
_OWN = {"total_epochs": "epochs", "name": None, "root": None, "digest": None, "num_classes": None, "loader": None}
_NETWORK = ("model", "model_args", "weights", "weights_key", "training", "ensemble")
_CONFIGURED = {  # sections, and what of them is not the caller's to configure
    "student": _NETWORK,
    "teacher": _NETWORK,
    "data": ("name", "root", "digest", "num_classes", "image_size", "loader"),
    "distill": ("method",),
    "run": ("dir", "name"),
    "train": (),
    "loss": (),
}
_OTHER_NAMES = {"lr": "learning_rate", "batch_size": "global_batch_size", "wd": "weight_decay"}
_BATCHES = (8, 16, 32, 64, 128)
_SAMPLERS = (RandomSampler, SequentialSampler, DistributedSampler)

_ONE_AT_A_TIME = threading.RLock()  # those settings are torch's, not a thread's, and so are torch.fx's patches

_logger = logging.getLogger("unikd_fast")


@dataclass(frozen=True)
class Run:
    """A finished run of `distill`.

    Attributes:
        student: trained network, the one that was passed, with the weights of the last step.
        folder: run folder: metrics, checkpoints, configuration, result.
        result: content of result.json: accuracy and cross-entropy of the last and the best evaluation.
    """

    student: nn.Module
    folder: Path
    result: Mapping[str, Any]
    _objects: Mapping[str, Any] = field(repr=False)

    @property
    def accuracy(self) -> float:
        """Return the student's accuracy in percent on the test data, or on the validation data if there are none."""
        return float(self.result["last"]["test"]["accuracy"])

    def report(self, target: str | Path | None = None) -> Path:
        """Write the page about the run and return its path.

        Args:
            target: HTML file, which is replaced if it exists. If None, report.html in the run folder.

        Raises:
            ReportError: the target is not the name of an HTML file.
        """
        from unikd_fast.report.command import write_report
        from unikd_fast.report.runs import find_runs

        page = self.folder / "report.html" if target is None else Path(target)
        write_report(find_runs([self.folder]), page, force=True)
        return page

    def export(
        self, target: str | Path, *, checkpoint: str = "last", preprocess: bool = False, force: bool = False
    ) -> Path:
        """Write the student to a file of its own, as `unikd export` does, and return its path.

        Args:
            target: file; its suffix is the format: .safetensors, .onnx or .pt.
            checkpoint: "last" or "best".
            preprocess: whether the file, ONNX, takes images of any size and preprocesses them itself.
            force: whether to replace an existing file.

        Raises:
            ConfigError: the file exists, or the suffix is unknown.
            RunError: the network cannot be exported to this format.
        """
        from unikd_fast.export.command import export_run

        with giving(self._objects):
            said = export_run(self.folder, Path(target), checkpoint=checkpoint, preprocess=preprocess, force=force)
            _logger.info(said)
        return Path(target)


def distill(
    teacher: nn.Module | Sequence[nn.Module] | None,
    student: nn.Module,
    train: Any,
    val: Any,
    test: Any = None,
    *,
    teacher_weights: Sequence[float] | None = None,
    method: str | Sequence[str] = "unikd",
    epochs: int = 30,
    image_size: int | None = None,
    dir: str | Path | None = None,
    resume: bool = False,
    feature_nodes: Mapping[str, Sequence[str]] | None = None,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Distil a teacher into a student, as `unikd train` does, and return the run with the trained student.

    One process needs no launcher; the same call in a script that torchrun or deepspeed starts trains on all processes.
    Calls in several threads run one after the other.

    Args:
        teacher: trained network that maps images (N, 3, H, W) to logits (N, K), to a tuple that starts with them, or to
            an object or dictionary that has ``logits``. It is left as it is. Of a list of networks the student learns
            the mean of the logits, and the features of the first. May be None for method "none".
        student: network of the same kind, which gets the trained weights.
        train, val: map-style data sets whose items are (image, label), or DataLoaders of such data sets, whose batch
            size and number of workers are taken. Images are PIL images or uint8 tensors (3, H, W), which are augmented
            as ``data.augmentation`` says, or float tensors (3, S, S) that the data set's own transforms made. Labels
            are 0 to K - 1.
        test: data for the final accuracy. If None, those of val.
        teacher_weights: weight of each network of a list. If None, all have the same.
        method: name of a method, or a list, which is their sum; see docs/methods.md.
        epochs: number of epochs.
        image_size: height and width in pixels of the images that the networks see. If None, those of the float tensors,
            or the short side of the first image and at most 224.
        dir: run folder. If None, a new folder in runs/.
        resume: whether to continue the run in ``dir``, or show it if it is finished.
        feature_nodes: names of the modules whose outputs are the levels, by "teacher" and "student". If None, the ends
            of the stages.
        config: any other setting by its key in a configuration file, such as {"teacher.precision": "fp32"}.
        settings: settings of the method and of the sections train, loss, run and data, such as ``temperature=2.0`` or
            ``learning_rate=0.1``; of several methods a dictionary for each by its name. If they are not given, the
            batch size is 128 or what fits 16 times into the data, the learning rate of sgd 0.05 and of adamw 0.001, the
            weight decay 5e-4, with a warm-up of one epoch in runs of five or more.

    Raises:
        ConfigError: something does not fit together; the message says what to change.
        RunError: the run ended early, as for `unikd train`.

    Example:
        >>> run = distill(teacher, student, train_set, val_set, method="unikd", epochs=30)
        >>> run.accuracy
        93.1
    """
    teachers: list[Any] = [] if teacher is None else [teacher]
    if isinstance(teacher, list | tuple):
        teachers = list(teacher)
    plain = _unwrapped(student)
    _check_arguments(method, epochs, config or {}, feature_nodes or {})
    with _undisturbed():
        processes = start_processes()
        raw, objects = _described(
            [_unwrapped(each) for each in teachers],
            plain,
            (train, val, test),
            processes,
            method=method,
            epochs=epochs,
            image_size=image_size,
            settings=settings,
            config=config or {},
        )
        for key, value in {"train.total_epochs": epochs, **(config or {})}.items():
            assign(raw, key, value, "config")
        for role, nodes in (feature_nodes or {}).items():
            if role not in raw:
                raise ConfigError(f"feature_nodes has {role!r}; its keys are 'student' and 'teacher'")
            raw[role]["feature_nodes"] = list(nodes)
        if raw.get("compare"):
            raise ConfigError("config has compare; call distill once for each method and seed")
        if resume and dir is None:
            raise ConfigError("resume = True without dir; give the folder of the run to continue")
        label = method if isinstance(method, str) else "+".join(method)
        folder = processes.from_first(lambda: dir or _new_folder(f"{label}-{type(plain).__name__}"))
        raw["run"]["dir"] = str(folder)
        if teacher_weights is not None:
            _weigh(raw, teacher_weights)
        if _logger.hasHandlers() and not _logger.handlers:  # the caller has set up logging, and gets each message once
            _logger.addHandler(logging.NullHandler())
        with giving(objects):
            done = launch(parse_config(raw, name=label, source="distill"), resume=resume)
        assert done is not None
        result = read_result(done)
        assert result is not None
        import_student(plain, done / STUDENT)
    return Run(student, done, result, objects)


def _check_arguments(method: Any, epochs: Any, config: Any, feature_nodes: Any) -> None:
    """Refuse arguments of other types, and keys of a configuration that are arguments."""
    names = [method] if isinstance(method, str) else method
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"method = {method!r}; give the name of a method, or a list of names: {', '.join(METHODS)}")
    if not isinstance(epochs, Real):
        raise ConfigError(f"epochs = {epochs!r}; give a whole number")
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise ConfigError(f"config = {config!r}; give a dictionary by keys, such as {{'teacher.precision': 'fp32'}}")
    for key, value in config.items():
        section, _, name = key.partition(".")
        if section in _CONFIGURED and not name:
            raise ConfigError(
                f"config has {section} = {value!r}, which would replace the whole section; name each of its keys, such "
                "as {'teacher.precision': 'fp32'}"
            )
        if name.partition(".")[0] in _CONFIGURED.get(section, ()):
            raise ConfigError(f"config has {key} = {value!r}, which the arguments of distill decide; leave it out")
    if not isinstance(feature_nodes, Mapping) or any(isinstance(nodes, str) for nodes in feature_nodes.values()):
        raise ConfigError(
            f"feature_nodes = {feature_nodes!r}; give a list of names for each network: {{'student': ['layer1', ...]}}"
        )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Run with gradients, in fp32 on the CPU by default, whatever the caller's settings are, and restore those.

    Restored are also torch's random numbers, its number of threads, cuDNN's choice of algorithms and the variables of
    launchers.
    """
    with _ONE_AT_A_TIME, ExitStack() as stack:
        dtype, threads, benchmark = torch.get_default_dtype(), torch.get_num_threads(), torch.backends.cudnn.benchmark
        variables = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.backends.cudnn.benchmark = benchmark
            for name, value in variables.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _described(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    data: tuple[Any, Any, Any],
    processes: Processes,
    *,
    method: str | Sequence[str],
    epochs: int,
    image_size: int | None,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a configuration file, and the objects that it names."""
    train, loader_batch, loader_workers = _dataset(data[0], "train")
    val, test = _dataset(data[1], "val")[0], None if data[2] is None else _dataset(data[2], "test")[0]
    networks = [("student", student), *(("teacher", teacher) for teacher in teachers)]
    for role, network in networks:
        _check_network(network, role)
    if not teachers and method != "none":
        raise ConfigError(f"method = {method!r} without a teacher; give one, or train alone with method = 'none'")
    sections = _sorted(method, settings)
    try:
        size = first_size(train, image_size)
        classes, *of_teachers = (
            _classes(network, role, config.get(f"{role}.image_size") or size) for role, network in networks
        )
        splits = load_datasets(
            train,
            val,
            test,
            num_classes=classes,
            image_size=size,
            workers=sections["data"].setdefault(
                "workers", DataSettings.workers if loader_workers is None else loader_workers
            ),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if other := next((each for each in of_teachers if each != classes), None):
        raise ConfigError(
            f"the student has {classes} classes and the teacher {other}; fine-tune the teacher on the student's "
            "classes, or give the student the teacher's"
        )
    if not splits.is_resized and (spare := sorted(sections["data"].keys() & {"augmentation", "second_view"})):
        raise ConfigError(
            f"{spare[0]} = {sections['data'][spare[0]]!r} with images that the data set's transforms turn into float "
            "tensors; leave it out, or give a data set whose items are PIL images or uint8 tensors"
        )
    if not splits.is_described and processes.is_first:
        _logger.warning(
            "exports will not say how images are preprocessed: the transforms of the val data set are not Resize, "
            "CenterCrop, ToTensor and Normalize of torchvision alone"
        )
    if processes.world_size > 1:
        for tensor in student.state_dict().values():  # other processes may have drawn other random weights
            _broadcast(tensor, processes)
    objects: dict[str, Any] = {PREFIX + digest(splits): splits}
    (data_name,) = objects
    described: list[dict[str, Any]] = []
    for role, network in networks:
        name = _name(network, role)
        objects[name] = network
        described.append({"model": _class_name(network), "weights": name})
    raw: dict[str, Any] = {"student": described[0], "distill": sections.pop("distill"), **sections}
    if teachers:
        raw["teacher"] = {**described[1], "ensemble": described[2:]}
    batch = loader_batch and loader_batch * processes.world_size
    raw["data"] |= {"name": "given", "digest": data_name, "image_size": size, "num_classes": classes}
    raw["train"] = (
        _usual({"total_epochs": epochs, **raw["train"]}, len(splits.train), batch, processes.world_size) | raw["train"]
    )
    return raw, objects


def _weigh(raw: dict[str, Any], weights: Sequence[float]) -> None:
    """Add the weight of each teacher."""
    teacher = raw.get("teacher", {})
    members = [teacher, *teacher.get("ensemble", [])]
    if len(weights) != len(members) or len(members) < 2:
        raise ConfigError(
            f"teacher_weights has {len(weights)} numbers for {len(members)} teachers; give a list of teachers, and one "
            "weight for each"
        )
    for member, weight in zip(members, weights, strict=True):
        member["weight"] = weight


def _usual(given: Mapping[str, Any], samples: int, batch: int | None, world_size: int) -> dict[str, Any]:
    """Return the settings of the training that were not given."""
    if batch is None:
        fitting = [each for each in _BATCHES if each <= samples // 16]
        batch = math.ceil(max(fitting, default=_BATCHES[0]) / world_size) * world_size
    adam = "adamw" in str(given.get("optimizer", "sgd"))
    return {
        "global_batch_size": batch,
        "learning_rate": 0.001 if adam else 0.05,
        "weight_decay": 5e-4,
        "warmup_epochs": 1 if given.get("total_epochs", 0) >= 5 and "warmup_steps" not in given else 0,
    }


def _sorted(method: str | Sequence[str], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return keyword arguments by section of the configuration.

    Raises:
        ConfigError: one is unknown.
    """
    names = [method] if isinstance(method, str) else list(method)
    found: dict[str, dict[str, Any]] = {section: {} for section in ("distill", *_SECTIONS)}
    found["distill"]["method"] = method if isinstance(method, str) else names
    known = {name: _keys(METHODS[name].settings_class) for name in names if name in METHODS}
    for key, value in settings.items():
        own = next((name for name, keys in known.items() if key in keys), None)
        if len(names) > 1 and key in names:
            found["distill"][key] = value
        elif own is not None and len(names) == 1:
            found["distill"].setdefault(own, {})[key] = value
        elif section := next((name for name, kind in _SECTIONS.items() if key in _keys(kind) - _OWN.keys()), None):
            found[section][key] = value
        else:
            raise ConfigError(_unknown(key, value, names, known))
    return found


def _unknown(key: str, value: Any, names: Sequence[str], known: Mapping[str, set[str]]) -> str:
    instead = _OWN.get(key)
    if instead is not None:
        return f"{key} = {value!r}: distill calls it {instead}"
    if key in _OWN:
        return f"{key} = {value!r}: distill takes it from the networks and data sets that it is given; leave it out"
    if len(names) > 1 and (own := next((name for name, keys in known.items() if key in keys), None)):
        return f"{key} = {value!r}: settings of several methods are dictionaries by their names: {own}={{{key!r}: ...}}"
    everything = {each for keys in known.values() for each in keys}
    everything |= {each for kind in _SECTIONS.values() for each in _keys(kind)} - _OWN.keys()
    arguments = {"epochs", "image_size", "dir", "resume", "method", "feature_nodes", "teacher_weights", "config"}
    near = get_close_matches(key, sorted(everything | arguments), n=3)
    near = [_OTHER_NAMES[key], *near] if key in _OTHER_NAMES else near
    return (
        f"distill has no setting {key!r}; nearest: {', '.join(near) or 'none'}; others are given by their keys in a "
        "configuration: config={'teacher.precision': 'fp32'}"
    )


@functools.cache
def _keys(kind: Any) -> set[str]:
    return set(kind.model_fields if issubclass(kind, BaseModel) else kind.__dataclass_fields__)


def _dataset(given: Any, part: str) -> tuple[Any, int | None, int | None]:
    """Return a data set, and the batch size and number of workers if it was given in a DataLoader.

    Raises:
        ConfigError: the DataLoader does what the engine would not do.
    """
    if not isinstance(given, DataLoader):
        return given, None, None
    if isinstance(given.dataset, IterableDataset):
        return given.dataset, None, None  # which is refused where all data sets are looked at
    remedy = "give the data set itself, or use unikd_fast.Distiller in a loop of your own"
    if given.collate_fn is not default_collate:
        raise ConfigError(
            f"the DataLoader of {part} has a collate_fn of its own, and distill makes batches itself; {remedy}"
        )
    if (
        given.batch_size is None
        or type(given.batch_sampler) is not BatchSampler
        or not isinstance(given.sampler, _SAMPLERS)
    ):
        kind = type(given.sampler if isinstance(given.batch_sampler, BatchSampler) else given.batch_sampler).__name__
        raise ConfigError(f"the DataLoader of {part} has a {kind}, and distill shuffles by itself; {remedy}")
    return given.dataset, given.batch_size, given.num_workers


def _check_network(network: Any, role: str) -> None:
    """Refuse what is not a network with weights, or whose weights no file of a run can hold."""
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"the {role} is a {type(network).__name__}; give a torch.nn.Module, such as "
            "timm.create_model('resnet18', num_classes=10)"
        )
    kind = type(network).__name__
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise ConfigError(
            f"the {role} is a {kind}, a network of TorchScript, which cannot be changed; give the network that it was "
            "made from"
        )
    if role == "student" and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(
            f"the student, a {kind}, has no parameter with requires_grad = True; set it for those that are to be "
            "trained"
        )
    for name, value in network.state_dict().items():
        if not isinstance(value, torch.Tensor):
            if role == "student":
                raise ConfigError(
                    f"the student's state dict has {name}, a {type(value).__name__}, and distill writes tensors alone; "
                    "give a network without get_extra_state"
                )
        elif value.is_meta:
            raise ConfigError(f"the {role}'s {name} is on the device meta, without data; load its weights first")
        elif value.is_inference():
            raise ConfigError(f"the {role} was made in torch.inference_mode, for good; make it outside, or in no_grad")
    try:
        copy.deepcopy(network)
    except Exception as error:
        raise ConfigError(
            f"the {role}, a {kind}, cannot be copied ({type(error).__name__}: {error}), and a copy is what runs; keep "
            "locks, files and generators out of the network, or give it a __deepcopy__"
        ) from error


def _unwrapped(network: Any) -> Any:
    """Return the network that torch.compile, DataParallel or DistributedDataParallel wraps, or itself."""
    while isinstance(network, nn.Module):
        wrapped = isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = network.module if wrapped else getattr(network, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        network = inner
    return network


def _classes(network: nn.Module, role: str, image_size: int) -> int:
    first = next((each for each in network.parameters() if each.is_floating_point()), torch.empty(0))
    device, run = first.device, LogitsOnly(network)
    logits = check_forward(
        lambda images: run(images.to(first.dtype)),
        {network: False},
        what=f"the {role}",
        image_size=image_size,
        key=f"{role}.image_size",
        device=device,
    ).logits
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(f"the {role} must return logits (N, K), got {shape} for two images; give it a classifier")
    return logits.shape[1]


def _broadcast(tensor: torch.Tensor, processes: Processes) -> None:
    """Give all processes the first one's tensor."""
    shared = tensor.detach().to(processes.device)
    dist.broadcast(shared, 0)
    tensor.detach().copy_(shared)


def _name(network: nn.Module, role: str) -> str:
    """Return the name of a network: a digest of its role, its classes, their settings and its tensors.

    Of the student only the shapes count: a run is continued from a checkpoint's weights, whatever the new object has.
    """
    tensors = {name: each for name, each in network.state_dict().items() if isinstance(each, torch.Tensor)}
    if role == "student":
        tensors = {name: torch.tensor(each.shape) for name, each in tensors.items()}
    return PREFIX + sha256((role + repr(network) + hash_tensors(tensors)).encode()).hexdigest()[:12]


def _class_name(network: nn.Module) -> str:
    kind = type(network)
    return f"{kind.__module__}:{kind.__qualname__}"


def _new_folder(name: str) -> Path:
    return next(path for number in itertools.count(1) if not (path := Path("runs") / f"{name}-{number}").exists())
