"""The stand-in: the same rows on scikit-learn's digits, with networks and epochs for a machine without data or GPU.

It shows that the tables run, resume and come to a ledger; its accuracies are no statement about the paper's. Methods
keep the settings of their recipe, but for what counts epochs or samples.
"""

from typing import Any

from unikd_fast.recipes import METHODS, Pair
from unikd_fast.reproduce.cells import TEACHER, Cell, Table


def _pair(teacher: str, student: str) -> Pair:
    return Pair("digits", f"cifar/{teacher}", f"cifar/{student}", "", 0.05)


_SAME_FAMILY = (_pair("resnet20", "resnet8"), _pair("wrn_16_2", "wrn_16_1"))
_OTHER_FAMILY = (_pair("wrn_16_2", "resnet8"), _pair("resnet20", "wrn_16_1"))
# What stands in for the columns of each table; of Table 6 a pair of one family and one of two, as there.
_PAIRS = {
    "table1": _SAME_FAMILY,
    "table2": _OTHER_FAMILY,
    "table3": (_SAME_FAMILY[0], _OTHER_FAMILY[1]),
    "table5": _SAME_FAMILY,
    "table6": (_SAME_FAMILY[0], _OTHER_FAMILY[0]),
    "table7": _SAME_FAMILY,
    "blockwise": (*_SAME_FAMILY, *_OTHER_FAMILY),
    "methods": _SAME_FAMILY[:1],
}

_TRAIN: dict[str, Any] = {
    "total_epochs": 50,
    "global_batch_size": 50,
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "weight_decay": 0.0005,
    "schedule": "cosine",
}
_TEACHER_EPOCHS = 8
_STUDENT_SAMPLES = 100
_NEGATIVES = 256  # of CRD, whose published 16,384 are drawn from 50,000 samples
_HEAD_STEPS = 600  # of UniKD's head, as in configs/digits.json; by default it has the 100 of the student


def stand_in(table: Table) -> Table:
    """The table with pairs of small networks on digits, of which no figures are printed."""
    title = f"{table.title}; a stand-in on digits"
    return table._replace(title=title, number=None, pairs=_PAIRS[table.name], metrics=("top1",))


def digits_config(cell: Cell) -> dict[str, Any]:
    """The configuration of a cell on digits, without the weights of its teacher.

    Teachers are trained on all samples and students on few labelled ones, so that there is something to distil.
    """
    alone = cell.method in (TEACHER, "none")
    data: dict[str, Any] = {"name": "digits", "image_size": 16}
    train = dict(_TRAIN)
    if cell.method == TEACHER:
        train["total_epochs"] = _TEACHER_EPOCHS
    else:
        data["train_samples"] = _STUDENT_SAMPLES
    config: dict[str, Any] = {
        "run": {"log_every_steps": 20, "evaluate_every_epochs": 10 if cell.method != TEACHER else 4},
        "data": data,
        "student": {"model": cell.pair.teacher if cell.method == TEACHER else cell.pair.student},
        "distill": {"method": "none"} if alone else _distill(cell),
        "train": train,
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    if not alone:
        config["teacher"] = {"model": cell.pair.teacher, "precision": "fp32", "fold_batch_norm": False}
    return config


def _distill(cell: Cell) -> dict[str, Any]:
    """Of the recipe; ramps take their default, a share of the run."""
    section: dict[str, Any] = _without_ramps(METHODS[cell.method].distill(cell.pair))
    methods = section["method"] if isinstance(section["method"], list) else [section["method"]]
    if "unikd" in methods:
        section["head_steps"] = _HEAD_STEPS
    if "crd" in methods:
        section["crd"] = {**section["crd"], "negatives": _NEGATIVES}
    return section


def _without_ramps(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_ramps(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if not key.endswith("ramp_epochs")
    }
