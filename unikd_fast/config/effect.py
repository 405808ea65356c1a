"""What a configuration sets and no run of it reads: no error, for runs share keys, but worth a word."""

from collections.abc import Iterable

from unikd_fast.config.distill import DistillConfig
from unikd_fast.config.methods import MethodName, section_names
from unikd_fast.config.runs import run_configs
from unikd_fast.config.schema import Config

_LEVELS = frozenset({"max_levels"})
_KD = frozenset({"ce_weight", "beta", "temperature", "scale_by_t2"})
_OWN = frozenset(section_names(DistillConfig))
_UNIKD = frozenset(DistillConfig.model_fields) - _OWN - {"method", "ce_weight"}

READS: dict[MethodName, frozenset[str]] = {
    "unikd": _UNIKD,
    "kd": _KD,
    "fitnet": _LEVELS,
    "at": _LEVELS,
    "ofd": _LEVELS,
    "reviewkd": _LEVELS,
    "blockwise": _LEVELS,
}
"""Keys of ``distill`` outside of the methods' sections that each method reads; the others read none."""


def without_effect(config: Config) -> str | None:
    """What was set and does nothing, in a line; None: nothing was.

    A key is read by some run, or it is of no use. A run of a comparison must read itself what it sets.

    Example:
        >>> without_effect(load_config("configs/cifar100/dkd/vgg13-vgg8.json", ["distill.alpha=2"]))
        'distill.alpha has no effect with method dkd; see distill.dkd'
    """
    singles = {label: single for label, _, single in run_configs(config)}
    methods = tuple(dict.fromkeys(name for single in singles.values() for name in single.distill.methods))
    found = [_sentence("", _unread(_explicit(config.distill), methods), methods)]
    for label, settings in config.compare.runs.items() if config.compare else ():
        keys = (key.removeprefix("distill.") for key, value in settings.items() if value is not None)
        own = singles[label].distill.methods
        found.append(_sentence(f"compare.runs[{label!r}]: ", _unread(keys, own), own))
    return ". ".join(filter(None, [*found, _compiled(singles.values())])) or None


def _explicit(distill: DistillConfig) -> list[str]:
    """The keys that a file sets; of a resolved configuration, which has them all, those that are not as by default."""
    given = distill.model_fields_set
    resolved = given == set(type(distill).model_fields)
    default = DistillConfig()
    return [
        key
        for key in type(distill).model_fields
        if key in given
        and getattr(distill, key) is not None
        and not (resolved and getattr(distill, key) == getattr(default, key, None))
    ]


def _unread(keys: Iterable[str], methods: Iterable[MethodName]) -> list[str]:
    read = frozenset[str]().union(*(READS.get(name, frozenset()) for name in methods))
    return [key for key in keys if key in _UNIKD | _KD and key not in read]


def _sentence(where: str, keys: list[str], methods: tuple[MethodName, ...]) -> str:
    if not keys:
        return ""
    names = ", ".join(f"distill.{key}" for key in keys)
    sections = [f"distill.{name}" for name in methods if name in _OWN and name != "kd"]
    hint = f"; see {', '.join(sections)}" if sections else ""
    verb, noun = "has" if len(keys) == 1 else "have", "method" if len(methods) == 1 else "methods"
    return f"{where}{names} {verb} no effect with {noun} {', '.join(methods)}{hint}"


def _compiled(singles: Iterable[Config]) -> str:
    teachers = [single.teacher for single in singles if "blockwise" in single.distill.methods]
    modes = [teacher.compile for teacher in teachers if teacher is not None and teacher.compile is not None]
    if not modes:
        return ""
    return (
        f"teacher.compile = {modes[0]!r} compiles the teacher's own pass alone: with method blockwise its blocks "
        "inside the student's stones run eagerly"
    )
