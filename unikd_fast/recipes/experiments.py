"""Experiments by name: the raw configuration of every recipe, and of the stand-ins on digits and toy scenes.

`read_experiment` is the one place where the options of a command become a configuration.
"""

import argparse
import copy
import difflib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unikd_fast.errors import ConfigError
from unikd_fast.recipes.pairs import CIFAR_PAIRS, COCO_PAIRS, IMAGENET_PAIRS, TEACHER, Pair
from unikd_fast.recipes.settings import CLASSIFIERS, METHODS
from unikd_fast.recipes.study import study_experiment

if TYPE_CHECKING:
    from unikd_fast.config import Config

TEACHERS_ROOTS = {"cifar100": "CIFAR100_TEACHERS", "coco": "DETECTRON2_ZOO"}
"""Environment variables of the folders that hold the published teachers, by data set; others are downloaded."""

_SHIPPED = Path(__file__).parents[1] / "configs"

# The tables on ImageNet and COCO have these alone.
_ON_IMAGENET = (TEACHER, "none", "at", "ofd", "crd", "reviewkd", "kd", "dkd", "unikd", "wkd", "blockwise")
_ON_COCO = (TEACHER, "none", "fitnet", "fgfi", "reviewkd", "kd", "dkd", "kd_fitnet", "dkd_reviewkd", "unikd")

_TRAIN: dict[str, dict[str, Any]] = {
    "cifar100": {
        "total_epochs": 240,
        "global_batch_size": 64,
        "optimizer": "sgd",
        "weight_decay": 0.0005,
        "schedule": "step",
        "milestones": [150, 180, 210],
    },
    "imagenet": {
        "total_epochs": 100,
        "global_batch_size": 512,
        "optimizer": "sgd",
        "weight_decay": 0.0001,
        "schedule": "step",
        "milestones": [30, 60, 90],
        "precision": "bf16",
        "channels_last": True,
    },
    "coco": {
        "total_epochs": 13,  # 117,266 images with boxes are 14,658 steps: 180,000 end in the thirteenth
        "max_steps": 180_000,
        "global_batch_size": 8,
        "optimizer": "sgd",
        "weight_decay": 0.0001,
        "schedule": "step",
        "milestone_steps": [120_000, 160_000],
        "warmup_steps": 1000,
    },
    "toy_scenes": {
        "total_epochs": 20,
        "global_batch_size": 8,
        "optimizer": "sgd",
        "learning_rate": 0.02,
        "weight_decay": 0.0001,
        "schedule": "cosine",
        "warmup_steps": 20,
        "clip_grad_norm": 10.0,
    },
    "digits": {
        "total_epochs": 50,
        "global_batch_size": 50,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "weight_decay": 0.0005,
        "schedule": "cosine",
    },
}
_DATA: dict[str, dict[str, Any]] = {
    "cifar100": {"name": "cifar100", "root": "${CIFAR100_ROOT}", "image_size": 32},
    "imagenet": {"name": "imagenet", "root": "${IMAGENET_ROOT}", "image_size": 224, "num_classes": 1000, "workers": 8},
    "coco": {"name": "coco", "root": "${COCO_ROOT}", "workers": 8},
}

# Students on COCO compute as those of Detectron2, and begin with torchvision's weights of ImageNet, whose bottlenecks
# have their strides in the 3x3; teachers of its zoo have them in the 1x1.
_CONVENTIONS: dict[str, Any] = {"conventions": "detectron2"}
_OF_THE_ZOO = {**_CONVENTIONS, "stride_in_1x1": True}
_NOT_FROZEN = {"frcnn/torchvision/mobilenet_v2": {**_CONVENTIONS, "frozen_stages": 0}}  # FREEZE_AT as published
_BODY = "IMAGENET1K_V1"

# On toy scenes networks are trained from nothing, the teacher on more images.
_TOY_STUDENT_SAMPLES = 100
_TOY_ARGS: dict[str, Any] = {
    "norm": "batch",
    "frozen_stages": 0,
    "out_channels": 64,
    "representation_size": 128,
    "anchor_sizes": [12, 20, 32, 48, 64],
    "box_batch_size_per_image": 64,
    "rpn_post_nms_top_n_train": 200,
    "rpn_post_nms_top_n_test": 100,
}

# On digits teachers are trained on all samples and students on few, so that there is something to distil.
_DIGITS_TEACHER_EPOCHS = 8
_DIGITS_STUDENT_SAMPLES = 100
_DIGITS_NEGATIVES = 256  # of CRD, whose published 16,384 are drawn from 50,000 samples
_DIGITS_HEAD_STEPS = 600  # of UniKD's head, as in configs/digits.json; the default is the student's 100


def recipe(name: str) -> dict[str, Any]:
    """Return the raw configuration of an experiment of the papers' tables.

    Args:
        name: "<data>/<method>/<teacher>-<student>", or "<data>/none/<network>" for a network that is trained alone.

    Raises:
        ConfigError: there is no such recipe; names the most similar ones.

    Example:
        >>> recipe("cifar100/kd/resnet56-resnet20")["distill"]
        {'method': 'kd', 'kd': {'ce_weight': 0.1, 'beta': 0.9, 'temperature': 4.0}}
    """
    found = _recipes()
    if name not in found:
        close = difflib.get_close_matches(name, found, n=3)
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(f"there is no recipe {name!r}; {meant}`unikd reproduce --list` lists all {len(found)}")
    return experiment(*found[name])


def recipe_names(prefix: str = "") -> list[str]:
    """Return the names of the recipes that begin with a prefix, in the order of the tables.

    Example:
        >>> recipe_names("imagenet/kd/")
        ['imagenet/kd/resnet34-resnet18', 'imagenet/kd/resnet50-mobilenetv1']
    """
    return [name for name in _recipes() if name.startswith(prefix)]


def experiment(method: str, pair: Pair, seed: int = 0) -> dict[str, Any]:
    """Return the raw configuration of a method with a pair of networks.

    Args:
        method: name in `METHODS`, or in `STUDY` or `TUNING` for their pairs; TEACHER trains the pair's teacher alone.
        seed: seed of the study's training images.
    """
    if pair.data == "study":
        config = study_experiment(method, pair, seed)
    else:
        small = {"digits": _on_digits, "toy_scenes": _on_toy_scenes}
        config = small.get(pair.data, _published)(method, pair)
    return copy.deepcopy(config)


def add_experiment_arguments(which: argparse._MutuallyExclusiveGroup) -> None:
    """Add the options that `read_experiment` reads, except `--set`.

    Args:
        which: group of a parser of which exactly one option is to be given.
    """
    which.add_argument("--config", metavar="FILE|NAME", help="experiment: a JSON file, or a shipped one such as digits")
    which.add_argument(
        "--recipe", metavar="NAME", help="experiment of the papers' tables; `unikd reproduce --list` lists them"
    )


def read_experiment(config: str | None, recipe_name: str | None, overrides: Sequence[str] = ()) -> "Config":
    """Return the configuration that the options of a command ask for.

    Args:
        config: JSON file, or name of a shipped configuration. If None, `recipe_name` is given.
        recipe_name: see `recipe`.
        overrides: see `load_config`.

    Raises:
        ConfigError: there is no such file or recipe, or the configuration is not usable.

    Example:
        >>> read_experiment(None, "cifar100/kd/vgg13-vgg8", ["train.max_steps=3"]).student.model
        'cifar/vgg8'
    """
    # Only now pydantic.
    from unikd_fast.config import load_config, parse_config

    if recipe_name is not None:
        name = recipe_name.replace("/", "-")
        return parse_config(recipe(recipe_name), overrides, name=name, source=f"--recipe {recipe_name}")
    assert config is not None
    return load_config(find_config(config), overrides)


def find_config(config: str) -> Path:
    """Return the path of a configuration: a file, or a shipped one by its name.

    Raises:
        ConfigError: there is neither; names the shipped ones, and the most similar of them.

    Example:
        >>> find_config("digits").name
        'digits.json'
    """
    path = Path(config)
    try:
        if path.is_file():
            return path
    except OSError:
        return path  # the reader says what is wrong with it
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.json")) if path.stem != "schema"}
    if config not in shipped:
        close = difflib.get_close_matches(path.stem, shipped)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"--config {config}: no such file, nor one of the shipped {', '.join(shipped)}{meant}")
    return shipped[config]


@cache
def _recipes() -> dict[str, tuple[str, Pair]]:
    """Return method and pair by the name of the recipe."""
    cells = [
        *((method, pair) for method in (TEACHER, *CLASSIFIERS) for pair in CIFAR_PAIRS),
        *((method, pair) for method in _ON_IMAGENET for pair in IMAGENET_PAIRS),
        *((method, pair) for method in _ON_COCO for pair in COCO_PAIRS),
    ]
    found: dict[str, tuple[str, Pair]] = {}
    for method, pair in cells:
        found.setdefault(_name(method, pair), (method, pair))
    return found


def _name(method: str, pair: Pair) -> str:
    return f"{pair.data}/{'none' if method == TEACHER else method}/{pair.networks(method)}"


def _published(method: str, pair: Pair) -> dict[str, Any]:
    rate, weights = pair.learning_rate, pair.teacher_weights
    if pair.data in TEACHERS_ROOTS:
        weights = f"${{{TEACHERS_ROOTS[pair.data]}}}/{weights}"
    if pair.data == "cifar100" and method == TEACHER:
        rate = 0.05  # of all teachers; a student's rate is that of its pair
    alone = method in (TEACHER, "none")
    teacher: dict[str, Any] = {"model": pair.teacher, "weights": weights}
    student: dict[str, Any] = {"model": pair.teacher if method == TEACHER else pair.student}
    if pair.data == "coco":
        teacher["model_args"] = _OF_THE_ZOO
        student |= {"model_args": _NOT_FROZEN.get(student["model"], _CONVENTIONS), "weights": _BODY}
    return {
        "run": {"dir": f"runs/{_name(method, pair)}-{{hash}}", "log_every_steps": 100},
        "data": _DATA[pair.data],
        **({} if alone else {"teacher": teacher}),
        "student": student,
        "distill": {"method": "none"} if alone else METHODS[method].distill(pair),
        "train": {**_TRAIN[pair.data], "learning_rate": rate, **(METHODS[method].train(pair) if not alone else {})},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }


def _on_toy_scenes(method: str, pair: Pair) -> dict[str, Any]:
    """Return the stand-in on generated scenes, without the weights of the teacher; see `_on_digits`."""
    data: dict[str, Any] = {"name": "toy_scenes", "synthetic_samples": 200}
    if method != TEACHER:
        data["train_samples"] = _TOY_STUDENT_SAMPLES
    alone = method in (TEACHER, "none")
    config: dict[str, Any] = {
        "run": {"log_every_steps": 20, "evaluate_every_epochs": 10},
        "data": data,
        "student": {"model": pair.teacher if method == TEACHER else pair.student, "model_args": _TOY_ARGS},
        "distill": {"method": "none"} if alone else _without_ramps(METHODS[method].distill(pair)),
        "train": _TRAIN["toy_scenes"],
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    if not alone:
        config["teacher"] = {"model": pair.teacher, "model_args": _TOY_ARGS}
    return config


def _on_digits(method: str, pair: Pair) -> dict[str, Any]:
    """Return the stand-in on scikit-learn's digits, without the weights of the teacher.

    It shows that the tables run, resume and end in a ledger; its accuracies say nothing about the papers'. Methods keep
    the settings of their recipe, except those that count epochs or samples.
    """
    data: dict[str, Any] = {"name": "digits", "image_size": 16}
    train = dict(_TRAIN["digits"])
    if method == TEACHER:
        train["total_epochs"] = _DIGITS_TEACHER_EPOCHS
    else:
        data["train_samples"] = _DIGITS_STUDENT_SAMPLES
        train["learning_rate"] = METHODS[method].train(pair).get("learning_rate", train["learning_rate"])
    alone = method in (TEACHER, "none")
    config: dict[str, Any] = {
        "run": {"log_every_steps": 20, "evaluate_every_epochs": 4 if method == TEACHER else 10},
        "data": data,
        "student": {"model": pair.teacher if method == TEACHER else pair.student},
        "distill": {"method": "none"} if alone else _distill_on_digits(method, pair),
        "train": train,
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    if not alone:
        config["teacher"] = {"model": pair.teacher, "precision": "fp32", "fold_batch_norm": False}
    return config


def _distill_on_digits(method: str, pair: Pair) -> dict[str, Any]:
    """Return the recipe's section; ramps take their default, a share of the run."""
    section = _without_ramps(METHODS[method].distill(pair))
    methods = section["method"] if isinstance(section["method"], list) else [section["method"]]
    if "unikd" in methods:
        section["unikd"] = {**section["unikd"], "head_steps": _DIGITS_HEAD_STEPS}
    if "crd" in methods:
        section["crd"] = {**section["crd"], "negatives": _DIGITS_NEGATIVES}
    return section


def _without_ramps(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_ramps(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if not key.endswith("ramp_epochs")
    }
