"""What a method reads of the configuration, and needs of each network, is what the configuration and the engine say."""

import logging
from typing import Any

import pytest
import torch

from support.real_runs import ALONE
from unikd_fast.config import Config, parse_config
from unikd_fast.config.effect import READS
from unikd_fast.config.schema import DistillConfig, section_names
from unikd_fast.engine import build
from unikd_fast.engine import run as launch
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.methods import METHODS, build_method, needs_of
from unikd_fast.engine.surroundings import Surroundings
from unikd_fast.methods import Method, ReviewKD

pytestmark = pytest.mark.usefixtures("group")


SHARED = set(DistillConfig.model_fields) - set(section_names(DistillConfig)) - {"method"}


def config_of(**distill: Any) -> Config:
    raw = {
        "data": {"name": "synthetic", "image_size": 16, "num_classes": 10, "synthetic_samples": 32},
        "teacher": {"model": "cifar/resnet8", "weights": "random", "precision": "fp32"},
        "student": {"model": "cifar/resnet8"},
        "distill": distill,
        "train": {"total_epochs": 1, "global_batch_size": 8, "learning_rate": 0.1},
    }
    return parse_config(raw, name="tiny", source="test")


def built(**distill: Any) -> Experiment:
    return build_experiment(config_of(**distill), ALONE)


class Noting:
    """A section that notes what is asked of it."""

    def __init__(self, section: DistillConfig) -> None:
        self._section = section
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._section, name)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_the_keys_that_the_configuration_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()

    def noted(distill: DistillConfig, around: Surroundings) -> Method:
        noting: Any = Noting(distill)
        method = build_method(noting, around)
        read.update(noting.read & SHARED)
        return method

    monkeypatch.setattr(build, "build_method", noted)
    method = built(method=name).method
    said = READS.get(name, frozenset())  # type: ignore[call-overload]
    assert read == said - {"max_levels"}  # which the networks are built with
    assert ("max_levels" in said) == (method.needs.levels or method.needs.before_activation)
    assert METHODS[name].method is type(method)


@pytest.mark.parametrize("before", [False, True])
def test_reviewkd_takes_of_the_student_what_it_looks_at(before: bool) -> None:
    settings = {"method": "reviewkd", "reviewkd": {"student_before_activation": before}}
    experiment = built(**settings)
    images = torch.zeros(2, 3, 16, 16)
    assert experiment.teacher is not None
    assert len(experiment.teacher(images).before_activation) == 3
    assert len(experiment.student(images).before_activation) == (3 if before else 0)
    assert experiment.method.needs == needs_of(config_of(**settings).distill)
    assert experiment.method.needs.before_activation == before
    assert ReviewKD.needs.before_activation_of("teacher") and not ReviewKD.needs.before_activation_of("student")
    # Together with a method that looks at both, the student gives it as well.
    both = built(method=["reviewkd", "ofd"])
    assert len(both.student(images).before_activation) == 3


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_launch_says_once_what_has_no_effect(
    dry_run: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Enough(Exception):
        pass

    def enough(*arguments: Any) -> str:
        raise Enough

    monkeypatch.setattr(launch, "start_processes", lambda timeout: ALONE)
    monkeypatch.setattr(launch, "describe" if dry_run else "deepspeed_config", enough)
    said = []
    for distill in ({"method": "dkd", "alpha": 2.0}, {"method": "dkd", "dkd": {"alpha": 2.0}}):
        caplog.clear()
        with pytest.raises(Enough):
            launch.launch(config_of(**distill), dry_run=dry_run)
        said.append([record.getMessage() for record in caplog.records if record.levelno == logging.WARNING])
    assert said == [["distill.alpha has no effect with method dkd; see distill.dkd"], []]
