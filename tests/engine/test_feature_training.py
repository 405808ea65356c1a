"""Methods on feature levels, configured and trained: on networks of different levels, sharded, summed and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.long_rounds import long
from support.real_runs import (
    ALONE,
    cached_config,
    save_teacher,
    train_here,
    train_records,
)
from unikd_fast.config import ConfigError, load_config
from unikd_fast.engine.build import build_experiment
from unikd_fast.methods import AT, OFD, FitNet, Method, ReviewKD
from unikd_fast.models import build_model, extract_features

TERMS = {"fitnet": "hint", "at": "attention", "ofd": "partial_l2", "reviewkd": "hcl"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of three levels before activation, and of four levels where the student has three."""
    folder = tmp_path_factory.mktemp("teachers")
    models = ("cifar/wrn_16_1", "cifar/vgg8")
    return {model: save_teacher(folder / f"{model[6:]}.pt", model) for model in models}


def config_of(
    folder: Path, teachers: dict[str, Path], name: str, *, model: str = "cifar/vgg8", **sections: Any
) -> Path:
    teacher = {"model": model, **sections.pop("teacher", {})}
    weights = str(teachers[model])
    return cached_config(
        folder,
        teachers[model],
        name=name,
        teacher={"weights": weights, "cache": {"mode": "off"}, **teacher},
        **sections,
    )


def method_of(path: Path) -> Method:
    return build_experiment(load_config(path), ALONE).method


def test_settings_reach_the_methods(tmp_path: Path, teachers: dict[str, Path]) -> None:
    def built(name: str, **settings: Any) -> Any:
        distill = {"method": name, **({name: settings} if settings else {})}
        return method_of(config_of(tmp_path, teachers, name, distill=distill, loss={"label_smoothing": 0.1}))

    found = [built(name) for name in TERMS]
    assert [type(method) for method in found] == [FitNet, AT, OFD, ReviewKD]
    assert [method.label_smoothing for method in found] == [0.1] * 4
    fitnet, at, ofd, reviewkd = found
    assert (fitnet.settings.weight, fitnet.settings.level, at.settings.weight) == (100.0, 1, 1000.0)
    assert (ofd.settings.weight, reviewkd.weight.peak) == (1e-3, 1.0)
    assert reviewkd.weight.epochs == pytest.approx(0.08 * 3)  # of this run's three epochs, which are fewer than 20
    told = built("fitnet", level=2, weight=5.0)
    assert (told.adapter.level, told.settings.weight) == (2, 5.0)
    told = built("reviewkd", weight=8.0, ramp_epochs=1.0, width=24, student_before_activation=True)
    assert (told.weight.peak, told.weight.epochs) == (8.0, 1.0)
    assert told.adapter.before_activation and told.adapter.fusions[0].project[0].out_channels == 24


def test_invalid_settings_are_refused(tmp_path: Path, teachers: dict[str, Path]) -> None:
    unused = config_of(tmp_path, teachers, "unused", distill={"method": "kd"})
    with pytest.raises(ConfigError, match=r"distill\.at"):
        load_config(unused, ["distill.at.weight=2.0"])
    negative = config_of(tmp_path, teachers, "negative", distill={"method": "at", "at": {"weight": -1.0}})
    with pytest.raises(ConfigError, match=r"distill\.at\.weight"):
        load_config(negative)
    level = config_of(tmp_path, teachers, "level", distill={"method": "fitnet", "fitnet": {"level": 3}})
    with pytest.raises(ConfigError, match="level must be from 0 to 2, got 3: the student has 3 levels"):
        method_of(level)


def test_ofd_with_teacher_batch_statistics(tmp_path: Path, teachers: dict[str, Path]) -> None:
    """As the authors', which is in training mode; and nothing of it changes from batch to batch."""
    authors = {"distill": {"method": "ofd", "ofd": {"teacher_batch_statistics": True}}}
    unfolded: dict[str, Any] = {"teacher": {"fold_batch_norm": False}}
    folded = config_of(tmp_path, teachers, "folded", **authors)
    with pytest.raises(ConfigError, match=r"teacher_batch_statistics = true .*; set teacher\.fold_batch_norm = false"):
        method_of(folded)
    found = build_experiment(load_config(config_of(tmp_path, teachers, "authors", **authors, **unfolded)), ALONE)
    usual = build_experiment(load_config(config_of(tmp_path, teachers, "usual", distill={"method": "ofd"})), ALONE)
    images = next(iter(found.loader.train(0))).images
    model = build_model("cifar/vgg8", num_classes=10, weights=str(teachers["cifar/vgg8"]))
    network = extract_features(model, image_size=16, before_activation=True).train()
    with torch.no_grad():
        expected = network(images).before_activation
    for batch in (images[4:], images):
        levels = found.teacher(batch).before_activation  # type: ignore[misc]
    of_eval = usual.teacher(images).before_activation  # type: ignore[misc]
    for level, theirs, ours in zip(levels, expected, of_eval, strict=True):
        torch.testing.assert_close(level, theirs, rtol=1e-4, atol=1e-5)  # fp32, channels_last
        assert (level - ours).norm() > 0.02 * ours.norm()
    assert all(torch.equal(*pair) for pair in zip(found.method.margins, usual.method.margins, strict=True))  # type: ignore[attr-defined]


@pytest.mark.long
def test_ofd_trains_with_teacher_batch_statistics(tmp_path: Path, teachers: dict[str, Path]) -> None:
    distill = {"method": "ofd", "ofd": {"teacher_batch_statistics": True}}
    for precision in ("fp32", "bf16"):
        teacher = {"fold_batch_norm": False, "precision": precision}
        path = config_of(tmp_path, teachers, precision, distill=distill, teacher=teacher, train=TRAIN)
        values = values_of("partial_l2", path)
        assert sum(values[-3:]) < 0.9 * sum(values[:3])


# ReviewKD with the literature's weight for both of these teachers.
SETTINGS: dict[str, Any] = {"reviewkd": {"weight": 5.0}}
TRAIN = {"accumulation_steps": 2, "global_batch_size": 32, "total_epochs": 4, "learning_rate": 0.05}


def values_of(term: str, config: Path) -> list[float]:
    records = train_records(train_here(load_config(config)))
    return [record[term] for record in records if record["kind"] == "train"]


@pytest.mark.long
@pytest.mark.parametrize("model", ["cifar/vgg8", long("cifar/wrn_16_1")])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_falls_when_trained_on(tmp_path: Path, teachers: dict[str, Path], name: str, model: str) -> None:
    """Which training by the cross-entropy alone does not."""
    settings = SETTINGS.get(name, {})
    found = []
    for run, own in {"by it": settings, "without": {**settings, "weight": 0.0}}.items():
        distill = {"method": name, **({name: own} if own else {})}
        config = config_of(tmp_path, teachers, run, model=model, distill=distill, train=TRAIN)
        found.append(values_of(TERMS[name], config))
    by_it, without = found
    assert len(by_it) == len(without) == 12
    assert by_it[0] == without[0]
    assert sum(by_it[-3:]) < 0.9 * sum(by_it[:3])
    assert sum(by_it[-3:]) < 0.9 * sum(without[-3:])


@pytest.mark.slow
@pytest.mark.parametrize("teacher_head", [long("prefit"), "anchored"])
def test_direct_fdp_at_stage_3(tmp_path: Path, teachers: dict[str, Path], teacher_head: str) -> None:
    distill = {"method": "unikd", "fdp": "direct", "teacher_head": teacher_head}
    runs = [
        config_of(
            tmp_path,
            teachers,
            f"stage{stage}",
            distill=distill,
            train={**TRAIN, "max_steps": 4},
            deepspeed={"zero_optimization": {"stage": stage}},
        )
        for stage in (0, 3)
    ]
    replicated, sharded = (values_of("feature_kl", run) for run in runs)
    assert sharded == pytest.approx(replicated, rel=1e-3)


def test_the_literal_head_is_refused_at_stage_3(tmp_path: Path, teachers: dict[str, Path]) -> None:
    sections: dict[str, Any] = {"distill": {"method": "unikd", "teacher_head": "literal"}}
    stage = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    method_of(config_of(tmp_path, teachers, "whole", **sections))
    with pytest.raises(
        ConfigError, match=r"distill\.unikd\.teacher_head = 'literal' with deepspeed.*; set the stage to 2"
    ):
        method_of(config_of(tmp_path, teachers, "sharded", **sections, **stage))
