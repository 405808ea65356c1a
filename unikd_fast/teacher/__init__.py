"""The frozen teacher: run online, checked against itself in fp32, and cached."""

from unikd_fast.teacher.ensemble import Affine, Ensemble
from unikd_fast.teacher.fidelity import (
    Fidelity,
    check_fidelity,
    compare_features,
    exact_convolutions,
    measure_fidelity,
    pool_fidelity,
)
from unikd_fast.teacher.fold import fold_batch_norm
from unikd_fast.teacher.online import OnlineTeacher, resolve_precision

__all__ = [
    "Affine",
    "Ensemble",
    "Fidelity",
    "OnlineTeacher",
    "check_fidelity",
    "compare_features",
    "exact_convolutions",
    "fold_batch_norm",
    "measure_fidelity",
    "pool_fidelity",
    "resolve_precision",
]
