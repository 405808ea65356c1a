"""Settings that no run of a configuration reads: not an error, since runs share keys, but worth a warning."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from pydantic import BaseModel

from unikd_fast.config.load import run_configs
from unikd_fast.config.schema import Config, TrainConfig
from unikd_fast.methods import needs_of


class _Rule(NamedTuple):
    """Keys of a section that only some configurations read."""

    section: str
    keys: tuple[str, ...]
    read: Callable[[Config], bool]
    why: Callable[[Config], str]
    """Text that follows "has no effect"."""


def _with_data(config: Config) -> str:
    return f" with data.name = {config.data.name!r}"


def _by_augmentation(key: str, *keys: str, off: Any) -> _Rule:
    def read(config: Config) -> bool:
        return bool(getattr(config.data.augmentation, key) != off)

    return _Rule("data.augmentation", keys, read, lambda _: f" with {key} = {off!r}")


def _by_crop(crop: str, *keys: str) -> _Rule:
    def read(config: Config) -> bool:
        return config.data.first_augmentation.crop == crop

    return _Rule(
        "data.augmentation", keys, read, lambda config: f" with crop = {config.data.first_augmentation.crop!r}"
    )


def _of_levels(section: str, key: str) -> _Rule:
    return _Rule(
        section, (key,), lambda config: _uses_levels(config), lambda config: f" with method {config.distill.label}"
    )


_GENERATED = ("synthetic", "toy_scenes")
_WITHOUT_FILES = ("digits", *_GENERATED)
_IN_MEMORY = ("cifar100", *_WITHOUT_FILES)
_WITH_BOXES = ("coco", "voc", "toy_scenes")
_RULES = (
    _of_levels("distill", "max_levels"),
    _of_levels("teacher", "feature_nodes"),
    _of_levels("student", "feature_nodes"),
    _Rule(
        "train",
        ("milestones", "milestone_steps", "gamma"),
        lambda config: config.train.schedule == "step",
        lambda config: f" with train.schedule = {config.train.schedule!r}",
    ),
    _Rule(
        "train",
        ("momentum", "nesterov"),
        lambda config: config.train.optimizer == "sgd",
        lambda config: f" with train.optimizer = {config.train.optimizer!r}",
    ),
    _Rule("data", ("synthetic_samples",), lambda config: config.data.name in _GENERATED, _with_data),
    _Rule("data", ("image_size",), lambda config: config.data.name not in _WITH_BOXES, _with_data),
    _Rule(
        "data.detection",
        ("short_sides", "long_side", "eval_short_side", "scale_jitter"),
        lambda config: config.data.name in _WITH_BOXES,
        _with_data,
    ),
    _Rule("data", ("val_samples",), lambda config: config.data.name in ("cifar100", "image_folder"), _with_data),
    _Rule("data", ("root",), lambda config: config.data.name not in _WITHOUT_FILES, _with_data),
    _Rule(
        "data",
        ("workers", "dali_threads", "bad_images"),
        lambda config: config.data.name not in _IN_MEMORY,
        _with_data,
    ),
    _Rule(
        "data",
        ("max_bad_share",),
        lambda config: config.data.bad_images == "skip",
        lambda _: " with data.bad_images = 'error'",
    ),
    _Rule(
        "data.mixing",
        ("switch_probability",),
        lambda config: config.data.mixing.mixup_alpha > 0 and config.data.mixing.cutmix_alpha > 0,
        lambda _: ": one of mixup_alpha and cutmix_alpha is 0",
    ),
    _by_crop("pad", "padding"),
    _by_crop("resized", "scale", "ratio"),
    _by_augmentation("policy", "rand_ops", "rand_magnitude", off="none"),
    _by_augmentation("erase_probability", "erase_scale", "erase_ratio", off=0.0),
)


def without_effect(config: Config) -> str | None:
    """Describe the settings that have no effect, in one line, or return None if there are none.

    A key must be read by some run. A run of a comparison must itself read what it sets.
    Example:
        >>> without_effect(load_config("configs/cifar100.json", ["distill.method=dkd", "distill.max_levels=2"]))
        'distill.max_levels has no effect with method dkd'
    """
    singles = {label: single for label, _, single in run_configs(config)}
    found: list[str] = []
    for rule in _RULES:
        found.append(_useless("", rule, _explicit_keys(config, rule), list(singles.values())))
        for label, settings in config.compare.runs.items() if config.compare else ():
            set_there = [key for key in rule.keys if f"{rule.section}.{key}" in settings]
            found.append(_useless(f"compare.runs[{label!r}]: ", rule, set_there, [singles[label]]))
    for single in singles.values():
        found += _rate(single.train)
    return ". ".join(dict.fromkeys(filter(None, [*found, _compiled(singles.values())]))) or None


def _uses_levels(config: Config) -> bool:
    needs = needs_of(config.distill.settings)
    return needs.levels or needs.before_activation_of("student") or needs.before_activation_of("teacher")


def _explicit(section: Any) -> list[str]:
    """Return the keys that a file sets; for settings that do not record this, those that differ from the default."""
    if not isinstance(section, BaseModel):
        return [field.name for field in fields(section) if getattr(section, field.name) != field.default]
    given, known = section.model_fields_set, type(section).model_fields
    resolved = given == set(known)
    return [
        key
        for key, field in known.items()
        if key in given
        and getattr(section, key) is not None
        and not (resolved and getattr(section, key) == field.get_default(call_default_factory=True))
    ]


def _explicit_keys(config: Config, rule: _Rule) -> list[str]:
    section: Any = config
    for name in rule.section.split("."):
        section = getattr(section, name)
    if section is None:
        return []
    return [key for key in _explicit(section) if key in rule.keys and getattr(section, key) != ()]


def _useless(where: str, rule: _Rule, keys: list[str], singles: list[Config]) -> str:
    if not keys or any(rule.read(single) for single in singles):
        return ""
    verb = "has" if len(keys) == 1 else "have"
    return f"{where}{', '.join(f'{rule.section}.{key}' for key in keys)} {verb} no effect{rule.why(singles[0])}"


def _rate(train: TrainConfig) -> list[str]:
    """Describe schedule settings that are never reached. `train.max_steps` is ignored: it shortens trial runs."""
    found = []
    if train.schedule == "step" and not (train.milestones or train.milestone_steps):
        found.append(
            "train.schedule = 'step' without train.milestones: the learning rate stays constant; set the epochs of its "
            "drops, or the steps as train.milestone_steps"
        )
    if train.schedule == "step" and (late := _late(train.milestones, train.total_epochs)):
        found.append(
            f"train.milestones = {late} not reached: the run ends after epoch {train.total_epochs} (train.total_epochs)"
        )
    if train.warmup_epochs >= train.total_epochs:
        found.append(
            f"train.warmup_epochs = {train.warmup_epochs:g} is not shorter than train.total_epochs = "
            f"{train.total_epochs}: the learning rate only rises, and the schedule never begins"
        )
    return found


def unreached_steps(train: TrainConfig, total_steps: int) -> list[str]:
    """Describe what of a schedule in steps a run never reaches, if it is `train.total_epochs` that end it.

    Example:
        >>> unreached_steps(load_config("configs/digits.json", ["train.warmup_steps=900"]).train, 400)
        ["train.warmup_steps = 900 is not shorter than the run's 400 steps: the schedule never begins"]
    """
    if total_steps == train.max_steps:
        return []
    found = []
    if train.schedule == "step" and (late := _late(train.milestone_steps, total_steps)):
        found.append(f"train.milestone_steps = {late} not reached: the run has {total_steps} steps")
    if train.warmup_steps >= total_steps:
        found.append(
            f"train.warmup_steps = {train.warmup_steps} is not shorter than the run's {total_steps} steps: the "
            "schedule never begins"
        )
    return found


def _late(milestones: Sequence[float], end: int) -> str:
    """Return the milestones that are not before the end, with their verb; empty if there are none."""
    late = [f"{milestone:.7g}" for milestone in milestones if milestone >= end]
    return f"{', '.join(late)} {'is' if len(late) == 1 else 'are'}" if late else ""


def _compiled(singles: Iterable[Config]) -> str:
    teachers = [single.teacher for single in singles if "blockwise" in single.distill.methods]
    modes = [teacher.compile for teacher in teachers if teacher is not None and teacher.compile is not None]
    if not modes:
        return ""
    return (
        f"teacher.compile = {modes[0]!r} compiles the teacher's own pass alone: with method blockwise its blocks "
        "inside the stepping stones run eagerly"
    )
