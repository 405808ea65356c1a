"""Distillation methods: one file each, one shape (:class:`Method`)."""

from unikd_fast.methods.at import AT
from unikd_fast.methods.blockwise import Blockwise
from unikd_fast.methods.crd import CRD
from unikd_fast.methods.dkd import DKD
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

__all__ = [
    "AT",
    "CRD",
    "DKD",
    "FLG",
    "KD",
    "MLKD",
    "NKD",
    "OFD",
    "Blockwise",
    "FitNet",
    "Hybrid",
    "Method",
    "Needs",
    "ReviewKD",
    "StudentAlone",
    "UniKD",
]
