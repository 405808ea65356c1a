"""The frozen teacher: run online here; the output cache will stand beside it."""

from unikd_fast.teacher.online import OnlineTeacher

__all__ = ["OnlineTeacher"]
