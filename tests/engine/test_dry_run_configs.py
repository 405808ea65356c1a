"""Every configuration that comes along can be run: its dry run builds the data, both networks and the method."""

from pathlib import Path
from typing import Any

import pytest

from support.real_runs import ALONE, process_group
from support.shipped_configs import (
    CLASSES,
    CONFIGS,
    RECIPES,
    SINGLE,
    TRAIN,
    a_few_of_all,
    name_of,
    write_cifar100,
    write_imagenet,
    write_teachers,
    write_torchvision,
)
from unikd_fast.config import ConfigError, load_config
from unikd_fast.engine.describe import describe
from unikd_fast.recipes import CIFAR_PAIRS, IMAGENET_PAIRS, METHODS

FEW = a_few_of_all()
SAMPLES = {"cifar100": TRAIN, "imagenet": CLASSES}
WRITERS = {
    "CIFAR100_ROOT": write_cifar100,
    "IMAGENET_ROOT": write_imagenet,
    "CIFAR100_TEACHERS": write_teachers,
    "TORCH_HOME": write_torchvision,
}


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the configurations name by environment variables."""
    with process_group(tmp_path_factory.mktemp("group")), pytest.MonkeyPatch.context() as patch:
        for variable, write in WRITERS.items():
            patch.setenv(variable, str(write(tmp_path_factory.mktemp(variable))))
        yield


def described(path: Path, *overrides: str) -> str:
    """The dry run, without comparing a teacher that knows nothing with itself."""
    config = load_config(path, overrides)
    if config.teacher is not None:
        config = load_config(path, [*overrides, "teacher.fidelity.batches=0"])
    return describe(config, ALONE)


def assert_described(path: Path) -> None:
    config, lines = load_config(path), described(path).splitlines()
    found = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    samples, size = SAMPLES.get(config.data.name), config.data.image_size
    assert f"{size} x {size}" in found["data"] and (samples is None or f" {samples} training samples" in found["data"])
    alone = config.distill.method == "none"
    assert config.student.model in found["network" if alone else "student"]
    assert ("teacher" in found) == (not alone)
    method = found["method"].removeprefix("method    ").partition(": ")[0]
    assert method == ("none, cross-entropy alone" if alone else config.distill.label)
    assert f"{config.train.total_epochs * int(found['steps'].split()[1])} in all" in found["steps"]
    assert "MiB per process" in found["memory"]


def test_the_few_have_every_method_and_every_pair() -> None:
    cifar = [path for path in FEW if path.parts[-3] == "cifar100"]
    assert {path.parent.name for path in cifar} == set(METHODS)
    assert {pair.name for pair in CIFAR_PAIRS} < {path.stem for path in cifar}
    imagenet = [path for path in FEW if path.parts[-3] == "imagenet"]
    assert {path.parent for path in imagenet} == {path.parent for path in RECIPES if path.parts[-3] == "imagenet"}
    assert {path.stem for path in imagenet} == {pair.name for pair in IMAGENET_PAIRS}


@pytest.mark.parametrize("path", [*SINGLE, *FEW], ids=name_of)
def test_a_dry_run_of_every_method_and_every_pair(path: Path) -> None:
    assert_described(path)


@pytest.mark.long
@pytest.mark.parametrize("path", [path for path in RECIPES if path not in FEW], ids=name_of)
def test_a_dry_run_of_all_others(path: Path) -> None:
    assert_described(path)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = CONFIGS / "cifar100" / "kd" / "vgg13-vgg8.json"
    monkeypatch.setenv("CIFAR100_TEACHERS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"vgg13_vanilla/ckpt_epoch_240\.pth"):
        described(path)
    monkeypatch.delenv("CIFAR100_ROOT")
    with pytest.raises(ConfigError, match="CIFAR100_ROOT"):
        described(path)
