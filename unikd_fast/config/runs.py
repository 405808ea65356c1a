"""From a comparison to its single runs, and from a run to that of its teacher."""

from collections.abc import Iterator
from typing import Any

from unikd_fast.config.check import methods_of
from unikd_fast.config.methods import unused_sections
from unikd_fast.config.override import override
from unikd_fast.config.schema import Config


def run_configs(config: Config) -> Iterator[tuple[str, int, Config]]:
    """The single runs of a comparison as (label, seed, config), or the one run itself."""
    if config.compare is None:
        yield "student", config.run.seed, config
        return
    for seed in config.compare.seeds:
        for label, settings in config.compare.runs.items():
            of_others = _without_sections(config, methods_of(config, settings))
            yield label, seed, override(config, {**of_others, **settings, "compare": None, "run.seed": seed}, label)


def teacher_config(config: Config) -> Config:
    """The run that trains the teacher of ``config``: the teacher's model as a student that learns alone."""
    assert config.teacher is not None
    assert config.teacher.training is not None
    training = config.teacher.training
    settings: dict[str, Any] = {
        "compare": None,
        "teacher": None,
        "distill.method": "none",
        "distill.ce_weight": None,
        **_without_sections(config, ()),
        "student.model": config.teacher.model,
        "student.feature_nodes": config.teacher.feature_nodes,
        "student.weights": None,
        "student.weights_key": None,
        "data.train_samples": training.train_samples,
        "train.max_steps": None,
    }
    for key in ("total_epochs", "learning_rate", "global_batch_size"):
        if getattr(training, key) is not None:
            settings[f"train.{key}"] = getattr(training, key)
    return override(config, settings, "teacher.training")


def _without_sections(config: Config, methods: tuple[str, ...]) -> dict[str, Any]:
    """Settings that take away the sections of other methods."""
    return {f"distill.{name}": None for name in unused_sections(config.distill, methods)}
