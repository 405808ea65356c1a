"""What keeps a step from being captured (train.cuda_graph): each is named with its remedy."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.captured_runs import CHANGING, config_of
from support.real_runs import ALONE
from unikd_fast.config import ConfigError
from unikd_fast.engine import cuda_graph as capture
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cuda_graph import captures, device_obstacles, obstacles


@pytest.fixture(scope="module")
def capturable(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Experiment:
    return build_experiment(config_of(tmp_path_factory.mktemp("run"), weights, "run", "kd"), ALONE)


def changed(experiment: Experiment, path: str, value: Any) -> Experiment:
    """The run with another value at a dotted path of its configuration."""
    config = experiment.config
    section, key = path.split(".")
    return replace(
        experiment, config=config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
    )


def test_a_plain_run_has_no_obstacle(capturable: Experiment) -> None:
    assert list(obstacles(capturable)) == []
    assert list(device_obstacles(ALONE)) == ["the device is cpu, not a CUDA device (run on a GPU)"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("train.optimizer", "fused_adamw", "train.optimizer = 'fused_adamw' .* (set sgd or adamw)"),
        ("train.optimizer", "cpu_adamw", "train.optimizer = 'cpu_adamw' .* (set sgd or adamw)"),
        ("train.precision", "fp16", "train.precision = 'fp16' has a loss scale .* (set bf16 or fp32)"),
        ("train.nonfinite", "skip", "train.nonfinite = 'skip' .* (set stop)"),
        ("train.activation_checkpointing", True, "train.activation_checkpointing .* (set it to false)"),
        ("train.compile", "reduce-overhead", "train.compile = 'reduce-overhead' .* (set null or 'default')"),
        ("teacher.compile", "max-autotune", "teacher.compile = 'max-autotune' .* (set null or 'default')"),
    ],
)
def test_settings(capturable: Experiment, path: str, value: Any, said: str) -> None:
    check(list(obstacles(changed(capturable, path, value))), said)


@pytest.mark.parametrize(
    ("deepspeed", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, "deepspeed.zero_optimization.stage = 2 .* (set it to 0)"),
        ({"wall_clock_breakdown": True}, "deepspeed has wall_clock_breakdown (remove these keys)"),
    ],
)
def test_deepspeed(capturable: Experiment, deepspeed: dict[str, Any], said: str) -> None:
    config = capturable.config.model_copy(update={"deepspeed": deepspeed})
    check(list(obstacles(replace(capturable, config=config))), said)


def test_several_processes(capturable: Experiment) -> None:
    check(
        list(obstacles(replace(capturable, processes=replace(ALONE, world_size=2)))),
        "2 processes exchange gradients (start one)",
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"augmentation": {"jitter": (0.4, 0.4, 0.4, 0.1)}}, "of the views are made image by image"),
        ({"augmentation": {"policy": "trivial"}}, "of the views are made image by image"),
        ({"mixing": {"mixup_alpha": 0.2}}, "data.mixing is drawn on the host (set mixup_alpha and cutmix_alpha to 0)"),
    ],
)
def test_data(tmp_path: Path, weights: Path, data: dict[str, Any], said: str) -> None:
    config = config_of(tmp_path, weights, "run", "kd", data={**CHANGING["data"], **data})
    check(list(obstacles(build_experiment(config, ALONE))), said)


def test_strong_second_views(tmp_path: Path, weights: Path) -> None:
    config = config_of(tmp_path, weights, "run", "mlkd", data={**CHANGING["data"], "second_view": None})
    check(list(obstacles(build_experiment(config, ALONE))), "of the second views are made image by image")


def test_a_loader_of_files_and_a_cache(capturable: Experiment) -> None:
    files: Any = SimpleNamespace()
    check(list(obstacles(replace(capturable, loader=files))), "decodes files on the host")
    check(list(obstacles(replace(capturable, cache=files))), "(set teacher.cache.mode = off)")


@pytest.mark.parametrize("method", ["unikd", ["unikd", "kd"]])
def test_a_jointly_trained_head(tmp_path: Path, weights: Path, method: Any) -> None:
    distill = {**CHANGING["distill"], "teacher_head": "anchored"}
    config = config_of(tmp_path, weights, "run", method, distill=distill)
    check(
        list(obstacles(build_experiment(config, ALONE))),
        "distill.unikd.teacher_head = 'anchored' the head's own optimiser",
    )


def test_obstacles_are_logged_once(
    capturable: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="unikd_fast")
    assert not captures(capturable)
    assert not caplog.records  # a run on a CPU
    caplog.set_level(logging.DEBUG, logger="unikd_fast")
    assert not captures(capturable)
    assert [record.message for record in caplog.records] == [
        "train.cuda_graph: steps are launched operation by operation, because the device is cpu, not a CUDA device "
        "(run on a GPU)"
    ]
    caplog.clear()
    assert not captures(replace(capturable, processes=replace(ALONE, rank=1)))
    assert not captures(changed(capturable, "train.cuda_graph", "off"))
    assert not caplog.records
    monkeypatch.setattr(capture, "device_obstacles", lambda processes: iter(()))
    assert captures(capturable)
    assert "captured in a CUDA graph" in caplog.text
    assert not captures(changed(capturable, "train.cuda_graph", "off"))


def test_cuda_graph_on_names_all_obstacles(capturable: Experiment) -> None:
    asked = changed(changed(capturable, "train.cuda_graph", "on"), "train.nonfinite", "skip")
    with pytest.raises(ConfigError) as error:
        captures(asked)
    check(
        [str(error.value)],
        "train.cuda_graph = 'on', but the step cannot be captured: the device is cpu, not a CUDA device (run on a "
        "GPU); train.nonfinite = 'skip' .* (set stop); or set it to auto",
    )


def check(found: list[str], said: str) -> None:
    """One obstacle that says so; " .* " stands for anything."""
    assert len(found) == 1, found
    place = 0
    for part in said.split(" .* "):
        assert part in found[0][place:], found[0]
        place = found[0].index(part, place) + len(part)
