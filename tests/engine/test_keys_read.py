"""What a method reads of the configuration, and needs of each network, is what the configuration and the engine say."""

import logging
from dataclasses import fields
from typing import Any

import pytest
import torch

from support.real_runs import ALONE
from unikd_fast.config import Config, parse_config
from unikd_fast.engine import build
from unikd_fast.engine import run as launch
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.methods import METHODS, OF_IMAGES, Method, ReviewKD, RunContext, needs_of


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
    """Settings that note what is asked of them."""

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._settings, name)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_method_reads_all_its_settings_in_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: dict[str, Noting] = {}

    def noting(settings: dict[str, Any], context: RunContext) -> Method[Any]:
        noted.update({name: Noting(own) for name, own in settings.items()})
        return METHODS[name](noted[name], context)

    monkeypatch.setattr(build, "build_method", noting)
    experiment = built(method=name)
    method = experiment.method
    assert type(method) is METHODS[name]
    batch, _ = next(experiment.micro_batches(0))
    if experiment.teacher is not None:
        features = experiment.teacher(batch.images)
        second = None if batch.second is None else experiment.teacher(batch.second)
        target = method.target(features, second)
    student = experiment.student_module(*filter(lambda view: view is not None, (batch.images, batch.second)))
    method.loss(student, target if experiment.teacher is not None else None, batch)
    assert {field.name for field in fields(METHODS[name].settings_class)} <= noted[name].read


@pytest.mark.parametrize("before", [False, True])
def test_reviewkd_gets_the_features_it_needs(before: bool) -> None:
    settings = {"method": "reviewkd", "reviewkd": {"student_before_activation": before}}
    experiment = built(**settings)
    images = torch.zeros(2, 3, 16, 16)
    assert experiment.teacher is not None
    assert len(experiment.teacher(images).before_activation) == 3
    assert len(experiment.student(images).before_activation) == (3 if before else 0)
    assert experiment.method.needs == needs_of(config_of(**settings).distill.settings)
    assert experiment.method.needs.before_activation == before
    assert ReviewKD.needs.before_activation_of("teacher") and not ReviewKD.needs.before_activation_of("student")
    # Together with a method that looks at both, the student gives it as well.
    both = built(method=["reviewkd", "ofd"])
    assert len(both.student(images).before_activation) == 3


@pytest.mark.parametrize("dry_run", [False, True])
def test_keys_without_effect_are_warned_about_once(
    dry_run: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Enough(Exception):
        pass

    def enough(*arguments: Any) -> str:
        raise Enough

    monkeypatch.setattr(launch, "start_processes", lambda timeout: ALONE)
    monkeypatch.setattr(launch, "describe" if dry_run else "check_engine", enough)
    said = []
    for distill in ({"method": "dkd", "max_levels": 2}, {"method": "dkd", "dkd": {"alpha": 2.0}}):
        caplog.clear()
        with pytest.raises(Enough):
            launch.launch(config_of(**distill), dry_run=dry_run)
        said.append([record.getMessage() for record in caplog.records if record.levelno == logging.WARNING])
    assert said == [["distill.max_levels has no effect with method dkd"], []]
