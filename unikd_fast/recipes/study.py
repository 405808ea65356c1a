"""The study on real images: every method after a search of its weights, and UniKD's choices one at a time.

Every method has four candidates, which `unikd reproduce tuning` compares on held-out images; `CHOSEN` names the best,
and `unikd reproduce study` runs it over seeds on the test images. `docs/defaults.md` reports the result, which the
defaults of the configuration follow.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from unikd_fast.recipes.pairs import TEACHER, Pair
from unikd_fast.recipes.settings import Setting

STUDY_ROOT = "STUDY_ROOT"
"""Environment variable of the folder that holds the image folders of the study."""

CIFAR10 = Pair("study", "cifar/resnet20", "cifar/resnet8", "", 0.05, "CIFAR-10, JPEG re-encoded")
TINY = Pair("study", "cifar/wrn_16_1", "cifar/resnet8", "", 0.05, "Tiny-ImageNet, 50 classes, 64 pixels")
STUDY_PAIRS = (CIFAR10, TINY)
"""Networks that two cores train in minutes, and the images of each in the remark."""


class Images(NamedTuple):
    """The images of a pair.

    Args:
        folder: folder below the study's root, with train/<class>/<image>, and val/<class>/<image> for the test.
        classes: their number.
        size: their side in pixels.
        held_out: training images that the teacher and the students of the search do not see, for validation.
        student_samples: training images of a student, others for every seed.
        teacher_epochs, student_epochs: lengths of the runs.
        batch_size: images a step.
        precision: of the students' and teachers' passes.
    """

    folder: str
    classes: int
    size: int
    held_out: int
    student_samples: int
    teacher_epochs: int
    student_epochs: int
    batch_size: int
    precision: Literal["fp32", "bf16"]


IMAGES = {
    CIFAR10.name: Images(
        "cifar10",
        classes=10,
        size=32,
        held_out=5000,
        student_samples=5000,
        teacher_epochs=8,
        student_epochs=12,
        batch_size=64,
        precision="fp32",
    ),
    TINY.name: Images(
        "tiny_imagenet",
        classes=50,
        size=64,
        held_out=2500,
        student_samples=2500,
        teacher_epochs=15,
        student_epochs=12,
        batch_size=32,
        precision="bf16",
    ),
}
"""By the names of pairs."""

_TUNING_DATA_SEED = 1000  # the search is on other images than any seed of the study
_HEAD_STEPS = 400  # of UniKD's head; the default is the student's 936
_NEGATIVES = 1024  # of CRD, whose published 16,384 are drawn from 50,000 samples


class Candidate(NamedTuple):
    """One setting of a method.

    Args:
        text: what it sets, in words.
        section: the `distill` section.
    """

    text: str
    section: dict[str, Any]


def _kd(ce_weight: float, beta: float) -> dict[str, Any]:
    return {"method": "kd", "kd": {"ce_weight": ce_weight, "beta": beta, "temperature": 4.0}}


def _dkd_section(alpha: float, beta: float) -> dict[str, Any]:
    return {"alpha": alpha, "beta": beta, "temperature": 4.0}


def _standardized(weight: float) -> dict[str, Any]:
    section = {"ce_weight": 1.0, "beta": weight, "temperature": 2.0, "standardized": True}
    return {"method": "kd", "kd": section}


def _mlkd(weight: float) -> dict[str, Any]:
    return {"method": "mlkd", "mlkd": {"weight": weight}}


def _reviewkd(weight: float) -> dict[str, Any]:
    return {"method": "reviewkd", "reviewkd": {"weight": weight}}


def _crd(weight: float) -> dict[str, Any]:
    return {"method": "crd", "crd": {"weight": weight, "negatives": _NEGATIVES}}


def _wkd(share: float) -> dict[str, Any]:
    return {"method": "wkd", "wkd": {"logit_weight": 200.0 * share, "feature_weight": 0.08 * share}}


def _unikd(alpha: float, beta: float) -> dict[str, Any]:
    section = {"alpha": alpha, "beta": beta, "temperature": 4.0, "head_steps": _HEAD_STEPS}
    return {"method": "unikd", "unikd": section}


def _unikd_dev(alpha: float, beta: float) -> dict[str, Any]:
    return {
        "method": ["unikd_dev", "dkd"],
        "unikd_dev": {"temperature": 1.0},
        "dkd": _dkd_section(alpha, beta),
    }


def _blockwise(weight: float) -> dict[str, Any]:
    return {"method": "blockwise", "blockwise": {"distill_weight": weight, "cross_weight": weight}}


_DKD = ((1.0, 2.0), (1.0, 8.0), (4.0, 8.0))

CANDIDATES: dict[str, tuple[str, tuple[Candidate, ...]]] = {
    "kd": (
        "KD",
        (
            Candidate("0.1 CE + 0.9 KD", _kd(0.1, 0.9)),
            Candidate("CE + 2 KD", _kd(1.0, 2.0)),
            Candidate("CE + 8 KD", _kd(1.0, 8.0)),
            Candidate("CE + 4 KD", _kd(1.0, 4.0)),
        ),
    ),
    "dkd": (
        "DKD",
        tuple(
            Candidate(f"alpha {a:g}, beta {b:g}", {"method": "dkd", "dkd": _dkd_section(a, b)})
            for a, b in (*_DKD, (8.0, 16.0))
        ),
    ),
    "standardized": (
        "logit standardisation",
        tuple(Candidate(f"CE + {weight:g} KD", _standardized(weight)) for weight in (1.0, 3.0, 9.0, 0.3)),
    ),
    "mlkd": ("MLKD", tuple(Candidate(f"weight {weight:g}", _mlkd(weight)) for weight in (0.1, 0.3, 0.9, 0.2))),
    "reviewkd": (
        "ReviewKD",
        tuple(Candidate(f"weight {weight:g}", _reviewkd(weight)) for weight in (0.6, 2.0, 6.0, 20.0)),
    ),
    "crd": ("CRD", tuple(Candidate(f"weight {weight:g}", _crd(weight)) for weight in (0.2, 0.8, 2.0, 0.05))),
    "wkd": (
        "WKD",
        tuple(Candidate(f"{share:g} of the published weights", _wkd(share)) for share in (0.05, 0.2, 1.0, 3.0)),
    ),
    "unikd": (
        "UniKD",
        tuple(
            Candidate(f"alpha {alpha:g}, beta {beta:g}", _unikd(alpha, beta))
            for alpha, beta in ((4.0, 1.0), (10.0, 1.0), (4.0, 4.0), (10.0, 4.0))
        ),
    ),
    "unikd_dev": (
        "UniKD, development code, with DKD",
        tuple(Candidate(f"DKD's alpha {a:g}, beta {b:g}", _unikd_dev(a, b)) for a, b in (*_DKD, (2.0, 4.0))),
    ),
    "blockwise": (
        "block-wise logit distillation",
        tuple(Candidate(f"weight {weight:g}", _blockwise(weight)) for weight in (0.3, 1.0, 3.0, 0.1)),
    ),
}
"""Title and candidates of every method: three, its published setting among them where there is one, and a fourth beyond
or between them, where the three were best on CIFAR-10."""

CHOSEN: dict[str, dict[str, int]] = {
    CIFAR10.name: {
        "kd": 3,
        "dkd": 2,
        "standardized": 0,
        "mlkd": 3,
        "reviewkd": 3,
        "crd": 0,
        "wkd": 2,
        "unikd": 2,
        "unikd_dev": 3,
        "blockwise": 3,
    },
    TINY.name: {
        "kd": 2,
        "dkd": 2,
        "standardized": 2,
        "mlkd": 2,
        "reviewkd": 3,
        "crd": 0,
        "wkd": 2,
        "unikd": 2,
        "unikd_dev": 3,
        "blockwise": 1,
    },
}
"""Which candidate was best in the search, by pair and method, counted from 0; `docs/study.json` has the figures."""


class Change(NamedTuple):
    """UniKD as chosen, with one thing changed.

    Args:
        choice: what is chosen.
        text: how it is settled here.
        keys: settings of `distill.unikd`.
        distill: further settings of `distill`.
        cache: settings of `teacher.cache`.
    """

    choice: str
    text: str
    keys: Mapping[str, Any] = MappingProxyType({})
    distill: Mapping[str, Any] = MappingProxyType({})
    cache: Mapping[str, Any] = MappingProxyType({})


_STORED = {"mode": "read_write", "recheck": 0.0}

CHANGES: dict[str, Change] = {
    "unikd_two_levels": Change("levels", "without the finest", distill={"max_levels": 2}),
    "unikd_last_level": Change("levels", "the deepest alone", {"fusion": "last"}),
    "unikd_channel_gate": Change("gate", "one map per channel", {"gate": "channel"}),
    "unikd_no_norm": Change("norm", "none", {"norm": None}),
    "unikd_batch_norm": Change("norm", "after the expanders", {"norm": "batch"}),
    "unikd_direct": Change("FDP", "direct", {"fdp": "direct"}),
    "unikd_anchored": Change("teacher's head", "anchored", {"teacher_head": "anchored"}),
    "unikd_alpha_1": Change("alpha", "1", {"alpha": 1.0}),
    "unikd_alpha_10": Change("alpha", "10", {"alpha": 10.0}),
    "unikd_beta_1": Change("beta", "1", {"beta": 1.0}),
    "unikd_views_1": Change("views", "1", cache={**_STORED, "views": 1}),
    "unikd_views_5": Change("views", "5", cache={**_STORED, "views": 5}),
    "unikd_views_all": Change("views", "one an epoch", cache=_STORED),
}
"""By the names of their rows."""


_AS_CHOSEN = {
    "levels": "all",
    "gate": "one map",
    "norm": "before the expanders",
    "FDP": "projected",
    "teacher's head": "prefit",
    "views": "online teacher",
}


def as_chosen(pair: Pair, choice: str) -> str:
    """Return how a choice is settled in UniKD as chosen.

    Example:
        >>> as_chosen(CIFAR10, "levels")
        'all'
    """
    return _AS_CHOSEN[choice] if choice in _AS_CHOSEN else f"{_chosen('unikd')(pair)['unikd'][choice]:g}"


def candidate_row(method: str, number: int) -> str:
    """Return the row of a candidate in the search.

    Example:
        >>> candidate_row("kd", 0)
        'kd_1'
    """
    return f"{method}_{number + 1}"


def chosen_row(method: str) -> str:
    """Return the row of a method as chosen by the search.

    Example:
        >>> chosen_row("kd")
        'tuned_kd'
    """
    return f"tuned_{method}"


def _candidate(method: str, number: int) -> Callable[[Pair], dict[str, Any]]:
    return lambda pair: CANDIDATES[method][1][number].section


def _chosen(method: str) -> Callable[[Pair], dict[str, Any]]:
    return lambda pair: CANDIDATES[method][1][CHOSEN[pair.name][method]].section


def _changed(change: Change) -> Callable[[Pair], dict[str, Any]]:
    def distill(pair: Pair) -> dict[str, Any]:
        section = _chosen("unikd")(pair)
        return {**section, **change.distill, "unikd": {**section["unikd"], **change.keys}}

    return distill


TUNING: dict[str, Setting] = {
    candidate_row(method, number): Setting(f"{title}, {candidate.text}", _candidate(method, number))
    for method, (title, candidates) in CANDIDATES.items()
    for number, candidate in enumerate(candidates)
}
"""The rows of the search."""

STUDY: dict[str, Setting] = {
    "none": Setting("student alone", lambda pair: {"method": "none"}),
    **{chosen_row(method): Setting(f"{title}, tuned", _chosen(method)) for method, (title, _) in CANDIDATES.items()},
    **{
        row: Setting(f"UniKD, tuned; {change.choice}: {change.text}", _changed(change))
        for row, change in CHANGES.items()
    },
}
"""The rows of the study: every method as chosen, then UniKD's choices."""


def study_experiment(row: str, pair: Pair, seed: int) -> dict[str, Any]:
    """Return the raw configuration of a row, without the weights of its teacher.

    One teacher serves all students; every seed draws training images of its own for them.
    """
    images = IMAGES[pair.name]
    is_tuning, is_teacher = row in TUNING, row == TEACHER
    epochs = images.teacher_epochs if is_teacher else images.student_epochs
    root = f"${{{STUDY_ROOT}}}/{images.folder}"
    data: dict[str, Any] = {
        "name": "image_folder",
        "root": f"{root}/train" if is_tuning or is_teacher else root,
        "image_size": images.size,
        "loader": "torchvision",
        "workers": 1,
        "augmentation": {"crop": "pad", "padding": images.size // 8},
    }
    if is_tuning or is_teacher:
        data["val_samples"] = images.held_out
    if not is_teacher:
        data |= {"train_samples": images.student_samples, "seed": seed + (_TUNING_DATA_SEED if is_tuning else 0)}
    section = {"method": "none"} if is_teacher else {**STUDY, **TUNING}[row].distill(pair)
    config: dict[str, Any] = {
        "run": {"log_every_steps": 100, "evaluate_every_epochs": epochs, "probe": False},
        "data": data,
        "student": {"model": pair.teacher if is_teacher else pair.student},
        "distill": section,
        "train": {
            "total_epochs": epochs,
            "global_batch_size": images.batch_size,
            "optimizer": "sgd",
            "learning_rate": pair.learning_rate,
            "weight_decay": 0.0005,
            "schedule": "cosine",
            "channels_last": True,
            "precision": images.precision,
        },
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    if section["method"] != "none":
        config["teacher"] = {"model": pair.teacher, "precision": images.precision}
        cache = CHANGES[row].cache if row in CHANGES else {}
        config["teacher"] |= {"cache": dict(cache)} if cache else {}
    return config
