"""Distillation methods: one file each, one shape (:class:`Method`)."""

from unikd_fast.methods.kd import KD
from unikd_fast.methods.method import Method
from unikd_fast.methods.student_alone import StudentAlone
from unikd_fast.methods.unikd import UniKD

__all__ = ["KD", "Method", "StudentAlone", "UniKD"]
