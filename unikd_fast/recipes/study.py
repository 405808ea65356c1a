"""The study of what UniKD's paper leaves open: its rows, and the configuration of each.

Eq. 1 to 7 are published; what trains the teacher's head, the shape of the gate, the width D and the weight alpha are
not. `docs/defaults.md` reports the study's result, which the defaults of the configuration follow.
"""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

from unikd_fast.recipes.pairs import TEACHER, Pair
from unikd_fast.recipes.settings import Setting

STUDY_PAIR = Pair("fine_grained", "cifar/resnet20", "cifar/resnet8", "", 0.05)
"""A teacher that can tell the generated classes apart, and a student that by itself cannot."""

HEADS, GATES, WIDTHS, ALPHAS = ("prefit", "anchored"), ("spatial", "channel"), (32, 64, 128), (1.0, 4.0, 10.0)
# The baseline levels: 64 is the deepest width of both networks, which `width: auto` comes to.
_WIDTH, _ALPHA = 64, 4.0


class Choice(NamedTuple):
    """One way to settle what is open."""

    head: str
    gate: str
    width: int
    alpha: float

    @property
    def name(self) -> str:
        """Return the name of its row.

        Example:
            >>> Choice("prefit", "spatial", 64, 4.0).name
            'unikd_prefit_spatial_64_4'
        """
        return f"unikd_{self.head}_{self.gate}_{self.width}_{self.alpha:g}"

    @property
    def title(self) -> str:
        return f"UniKD, {self.head} head, {self.gate} gate, D = {self.width}, alpha = {self.alpha:g}"


MIDDLE = Choice("prefit", "spatial", _WIDTH, _ALPHA)
"""The combination that the single changes start from."""

CHOICES = (
    *(Choice(head, gate, _WIDTH, alpha) for head, gate, alpha in product(HEADS, GATES, ALPHAS)),
    *(MIDDLE._replace(head=head, width=width) for head, width in product(HEADS, WIDTHS) if width != _WIDTH),
)
"""All combinations of head, gate and alpha; and of head and width, with the gate and the alpha of the middle."""

# Beside the combinations: the head that is not recommended, and larger weights.
_FURTHER = (
    *(Choice("literal", "spatial", _WIDTH, alpha) for alpha in ALPHAS),
    MIDDLE._replace(alpha=30.0),
    MIDDLE._replace(head="anchored", alpha=30.0),
)


class Change(NamedTuple):
    """A row that differs from another in one thing."""

    base: str
    text: str
    keys: dict[str, Any]


CHANGES: dict[str, Change] = {
    "unikd_last_level": Change(MIDDLE.name, "FDP only (the deepest level alone)", {"fusion": "last"}),
    "unikd_bilinear": Change(MIDDLE.name, "bilinear upsampling", {"upsample": "bilinear"}),
    # A method is no better for a larger sum of weights: as much of the logits' loss as KD has below.
    "unikd_beta_2": Change(MIDDLE.name, "beta = 2", {"beta": 2.0}),
    "unikd_beta_4": Change(MIDDLE.name, "beta = 4", {"beta": 4.0}),
    "unikd_beta_8": Change(MIDDLE.name, "beta = 8", {"beta": 8.0}),
    "unikd_beta_16": Change(MIDDLE.name, "beta = 16", {"beta": 16.0}),
    "unikd_beta_4_alpha_10": Change("unikd_beta_4", "alpha = 10", {"alpha": 10.0}),
    "unikd_beta_4_last_level": Change("unikd_beta_4", "FDP only", {"fusion": "last"}),
    "unikd_batch_norm": Change(MIDDLE.name, "batch norm after the expanders", {"norm": "batch"}),
    "unikd_batch_norm_anchored": Change("unikd_batch_norm", "anchored head", {"teacher_head": "anchored"}),
    "unikd_batch_norm_last_level": Change("unikd_batch_norm", "FDP only", {"fusion": "last"}),
    "unikd_batch_norm_alpha_10": Change("unikd_batch_norm", "alpha = 10", {"alpha": 10.0}),
    "unikd_batch_norm_beta_4": Change("unikd_batch_norm", "beta = 4", {"beta": 4.0}),
    "unikd_batch_norm_beta_8": Change("unikd_batch_norm", "beta = 8", {"beta": 8.0}),
    "unikd_input_norm": Change(MIDDLE.name, "batch norm before the expanders", {"norm": "input"}),
    "unikd_input_norm_anchored": Change("unikd_input_norm", "anchored head", {"teacher_head": "anchored"}),
    "unikd_input_norm_channel": Change("unikd_input_norm", "channel gate", {"gate": "channel"}),
    "unikd_input_norm_last_level": Change("unikd_input_norm", "FDP only", {"fusion": "last"}),
    "unikd_input_norm_alpha_1": Change("unikd_input_norm", "alpha = 1", {"alpha": 1.0}),
    "unikd_input_norm_alpha_10": Change("unikd_input_norm", "alpha = 10", {"alpha": 10.0}),
    "unikd_input_norm_beta_4": Change("unikd_input_norm", "beta = 4", {"beta": 4.0}),
}
"""Single changes by the names of their rows, each after the row that it changes."""


def _unikd(choice: Choice) -> dict[str, Any]:
    section = {"temperature": 4.0, "alpha": choice.alpha, "teacher_head": choice.head}
    return {"method": "unikd", "unikd": {**section, "gate": choice.gate, "width": choice.width, "norm": None}}


def _changed(row: str) -> dict[str, Any]:
    if row not in CHANGES:
        return _unikd(MIDDLE)
    return {"method": "unikd", "unikd": {**_changed(CHANGES[row].base)["unikd"], **CHANGES[row].keys}}


def _title(row: str) -> str:
    if row not in CHANGES:
        return "UniKD"
    return f"{_title(CHANGES[row].base)}, {CHANGES[row].text}"


def _kd(ce_weight: float, beta: float) -> dict[str, Any]:
    return {"method": "kd", "kd": {"ce_weight": ce_weight, "beta": beta, "temperature": 4.0}}


def _dkd(alpha: float, beta: float) -> dict[str, Any]:
    return {"method": "dkd", "dkd": {"alpha": alpha, "beta": beta, "temperature": 4.0}}


def _always(section: dict[str, Any]) -> Callable[[Pair], dict[str, Any]]:
    return lambda pair: section


STUDY: dict[str, Setting] = {
    "none": Setting("student alone", _always({"method": "none"})),
    "kd_1_1": Setting("CE + KD (UniKD without FDP and AFF)", _always(_kd(1.0, 1.0))),
    "kd_1_2": Setting("CE + 2 KD", _always(_kd(1.0, 2.0))),
    "kd_1_4": Setting("CE + 4 KD", _always(_kd(1.0, 4.0))),
    "kd_1_8": Setting("CE + 8 KD", _always(_kd(1.0, 8.0))),
    "kd_1_16": Setting("CE + 16 KD", _always(_kd(1.0, 16.0))),
    "kd_published": Setting("0.1 CE + 0.9 KD, as published", _always(_kd(0.1, 0.9))),
    "dkd_2": Setting("DKD, alpha 1, beta 2", _always(_dkd(1.0, 2.0))),
    "dkd_8": Setting("DKD, alpha 1, beta 8", _always(_dkd(1.0, 8.0))),
    "dkd_4_8": Setting("DKD, alpha 4, beta 8", _always(_dkd(4.0, 8.0))),
    **{each.name: Setting(each.title, _always(_unikd(each))) for each in (*CHOICES, *_FURTHER)},
    **{row: Setting(_title(row), _always(_changed(row))) for row in CHANGES},
}
"""Rows by their names: the baselines, each over a range of its own weight as UniKD is over alpha; then UniKD."""

SAME_LOGIT_LOSS = {
    MIDDLE.name: "kd_1_1",
    **{f"unikd_beta_{beta}": f"kd_1_{beta}" for beta in (2, 4, 8, 16)},
    "unikd_last_level": "kd_1_1",
    "unikd_batch_norm": "kd_1_1",
    "unikd_batch_norm_last_level": "kd_1_1",
    "unikd_batch_norm_beta_4": "kd_1_4",
    "unikd_batch_norm_beta_8": "kd_1_8",
    "unikd_input_norm": "kd_1_1",
    "unikd_input_norm_last_level": "kd_1_1",
    "unikd_input_norm_beta_4": "kd_1_4",
    "unikd_beta_4_alpha_10": "kd_1_4",
    "unikd_beta_4_last_level": "kd_1_4",
}
"""Rows of UniKD, and the rows that are the same without the features: Eq. 7 with alpha = 0."""

_CLASSES = 50
_TRAIN_SAMPLES = 3000
_SAMPLES = 9000  # generated; a third of them is the test split
_EPOCHS = 10
_TEACHER_EPOCHS = 20


def study_experiment(row: str, pair: Pair, seed: int) -> dict[str, Any]:
    """Return the raw configuration of a row, without the weights of its teacher.

    Every seed generates images of its own; its teacher and all its students train on the same 3000 of them.
    """
    section = {"method": "none"} if row == TEACHER else STUDY[row].distill(pair)
    epochs = _TEACHER_EPOCHS if row == TEACHER else _EPOCHS
    config: dict[str, Any] = {
        "run": {"log_every_steps": 100, "evaluate_every_epochs": epochs, "probe": False},
        "data": {
            "name": "fine_grained",
            "image_size": 16,
            "num_classes": _CLASSES,
            "synthetic_samples": _SAMPLES,
            "train_samples": _TRAIN_SAMPLES,
            "seed": seed,
            "augmentation": {"crop": "pad", "padding": 1},
        },
        "student": {"model": pair.teacher if row == TEACHER else pair.student},
        "distill": section,
        "train": {
            "total_epochs": epochs,
            "global_batch_size": 50,
            "optimizer": "sgd",
            "learning_rate": pair.learning_rate,
            "weight_decay": 0.0005,
            "schedule": "cosine",
        },
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    if section["method"] != "none":
        config["teacher"] = {"model": pair.teacher, "precision": "fp32", "fold_batch_norm": False}
    return config
