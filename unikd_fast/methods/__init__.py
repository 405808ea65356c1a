"""Distillation methods: one file per method, with its settings; all have the form of :class:`Method`."""

from functools import reduce
from typing import Any

from unikd_fast.methods.at import AT
from unikd_fast.methods.blockwise import Blockwise
from unikd_fast.methods.context import FeatureNetwork, RunContext
from unikd_fast.methods.crd import CRD
from unikd_fast.methods.dkd import DKD
from unikd_fast.methods.fgfi import FGFI
from unikd_fast.methods.fitnet import FitNet
from unikd_fast.methods.flg import FLG
from unikd_fast.methods.hybrid import Hybrid
from unikd_fast.methods.kd import KD, StudentAlone
from unikd_fast.methods.method import Method, Needs
from unikd_fast.methods.mlkd import MLKD
from unikd_fast.methods.nkd import NKD
from unikd_fast.methods.ofd import OFD
from unikd_fast.methods.reviewkd import ReviewKD
from unikd_fast.methods.unikd import UniKD
from unikd_fast.methods.unikd_dev import UniKDDev
from unikd_fast.methods.wkd import WKD

__all__ = [
    "AT",
    "CRD",
    "DKD",
    "FGFI",
    "FLG",
    "KD",
    "METHODS",
    "MLKD",
    "NKD",
    "OFD",
    "WKD",
    "Blockwise",
    "FeatureNetwork",
    "FitNet",
    "Hybrid",
    "Method",
    "Needs",
    "ReviewKD",
    "RunContext",
    "StudentAlone",
    "UniKD",
    "UniKDDev",
    "build_method",
    "needs_of",
]

METHODS: dict[str, type[Method[Any]]] = {
    "unikd": UniKD,
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
    "mlkd": MLKD,
    "flg": FLG,
    "wkd": WKD,
    "fitnet": FitNet,
    "fgfi": FGFI,
    "at": AT,
    "ofd": OFD,
    "reviewkd": ReviewKD,
    "crd": CRD,
    "blockwise": Blockwise,
    "unikd_dev": UniKDDev,
    "none": StudentAlone,
}
"""Every method by its name in a configuration, which is also the section of its settings."""

OF_IMAGES = tuple(name for name, method in METHODS.items() if not method.needs.near_objects)
"""Those that classifiers are distilled by."""


def needs_of(settings: dict[str, Any]) -> Needs:
    """Return what a method, or the sum of several, needs, before any of them is built.

    Args:
        settings: settings by name of the method.
    """
    return reduce(Needs.union, (METHODS[name].needs_of(own) for name, own in settings.items()))


def build_method(settings: dict[str, Any], context: RunContext) -> Method[Any]:
    """Build a method, or the sum of several.

    settings: settings by name of the method.
        settings: settings by the name of the method.
        context: what the run knows.
    """
    parts = {name: METHODS[name](own, context) for name, own in settings.items()}
    return next(iter(parts.values())) if len(parts) == 1 else Hybrid(parts, context)
