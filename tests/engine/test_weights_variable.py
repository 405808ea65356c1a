"""Weights whose path has an environment variable in it."""

from pathlib import Path

import pytest
import torch

from support.real_runs import CACHED, opened, write_config
from unikd_fast.cli import main
from unikd_fast.config import ConfigError

PATH = "${UNIKD_TEST_TEACHERS}/teacher.pth"


def config_of(folder: Path) -> Path:
    return write_config(folder, **{**CACHED, "teacher": {"weights": PATH}})


def test_a_variable_is_expanded(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIKD_TEST_TEACHERS", str(weights.parent))
    experiment = opened(config_of(tmp_path))
    assert experiment.teacher is not None
    stored = torch.load(weights, weights_only=True)["fc.weight"]
    found = experiment.teacher.network.plain.get_parameter("fc.weight")
    assert torch.equal(found, stored)
    assert experiment.config.teacher is not None
    assert experiment.config.teacher.weights == PATH  # the run is the same wherever they lie


def test_an_unset_variable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNIKD_TEST_TEACHERS", raising=False)
    with pytest.raises(ConfigError, match="UNIKD_TEST_TEACHERS is not set; set it by `export UNIKD_TEST_TEACHERS="):
        opened(config_of(tmp_path))


def test_each_network_has_its_own_weights_key(tmp_path: Path, weights: Path) -> None:
    states = [torch.load(weights, weights_only=True) for _ in range(3)]
    for number, state in enumerate(states):
        state["fc.bias"].fill_(number)
    torch.save(dict(zip(("model", "model_ema", "best"), states, strict=True)), tmp_path / "three.pth")
    file = {"weights": str(tmp_path / "three.pth")}
    networks = {"teacher": {**file, "weights_key": "best"}, "student": {"model": "cifar/resnet8", **file}}
    experiment = opened(write_config(tmp_path, **{**CACHED, **networks}))
    assert experiment.teacher is not None
    assert experiment.teacher.network.plain.get_parameter("fc.bias").tolist() == [2.0] * 10
    assert experiment.student.plain.get_parameter("fc.bias").tolist() == [1.0] * 10


def test_empty_weights_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--config", str(config_of(tmp_path)), "--set", "teacher.weights="]
    assert main(arguments) == 2
    assert "teacher.weights = '' is empty" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["cifar/resnet8", "torchvision/resnet18", "timm/resnet18"])
@pytest.mark.parametrize("value", ["hunter2", "/hunter2/teacher.pth"], ids=["a word", "a path"])
def test_the_value_of_a_variable_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, value: str
) -> None:
    """It may be a secret, whose name was mistyped for another's."""
    monkeypatch.setenv("UNIKD_TEST_SECRET", value)
    config = write_config(tmp_path, **{**CACHED, "teacher": {"weights": "${UNIKD_TEST_SECRET}", "model": model}})
    with pytest.raises((ValueError, FileNotFoundError), match=r"\$\{UNIKD_TEST_SECRET\}") as refused:
        opened(config)
    assert "hunter2" not in str(refused.value)


def test_the_value_of_a_root_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hunter2" / "train").mkdir(parents=True)
    config = write_config(tmp_path, data={"name": "image_folder", "root": "${UNIKD_TEST_SECRET}"})
    for value in ("hunter3", str(tmp_path / "hunter2")):
        monkeypatch.setenv("UNIKD_TEST_SECRET", value)
        assert main(["train", "--config", str(config)]) == 2
        said = capsys.readouterr().err
        assert "${UNIKD_TEST_SECRET}" in said and "is missing" in said and value not in said
