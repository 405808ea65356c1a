"""The experiments of the papers: pairs of networks, settings of each method, and the configurations made of both.

Beside them the study of what the paper leaves open.
"""

from unikd_fast.recipes.experiments import TEACHERS_ROOT, alone, experiment, experiments
from unikd_fast.recipes.pairs import CIFAR_PAIRS, IMAGENET_PAIRS, Pair
from unikd_fast.recipes.settings import METHODS, Setting
from unikd_fast.recipes.study import (
    ALPHAS,
    CHANGES,
    CHOICES,
    GATES,
    HEADS,
    MIDDLE,
    SAME_LOGIT_LOSS,
    STUDY,
    STUDY_PAIR,
    WIDTHS,
    Choice,
)

__all__ = [
    "ALPHAS",
    "CHANGES",
    "CHOICES",
    "CIFAR_PAIRS",
    "GATES",
    "HEADS",
    "IMAGENET_PAIRS",
    "METHODS",
    "MIDDLE",
    "SAME_LOGIT_LOSS",
    "STUDY",
    "STUDY_PAIR",
    "TEACHERS_ROOT",
    "WIDTHS",
    "Choice",
    "Pair",
    "Setting",
    "alone",
    "experiment",
    "experiments",
]
