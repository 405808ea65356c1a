"""What the tests of cached training share, those of unikd cache, and those of unikd export."""

import shutil
from pathlib import Path

import pytest

from support.cache_commands import PER_SHARD, cached_config, command, make_folder
from support.exported_runs import ALONE_TRAINED, SHORT, Runs, short, trained
from support.real_runs import save_teacher


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("weights") / "teacher.pth")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    averaged = short(folder, "averaged", distill={"head_steps": None})
    alone = short(folder, "alone", **ALONE_TRAINED, train={**SHORT["train"], "ema_decay": None})
    return Runs(trained(averaged), trained(alone))


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Path:
    """A run folder of one's own, to damage; "averaged" elsewhere, as after a move."""
    return Path(shutil.copytree(runs.averaged, tmp_path / "copy"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose cache is built, in several shards."""
    config = cached_config(tmp_path_factory.mktemp("built"))
    make_folder(config, PER_SHARD)
    assert command("build", "--config", config).returncode == 0
    return config


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A configuration with a copy of that cache, to be harmed."""
    shutil.copytree(built.parent / "cache", tmp_path / "cache")
    return cached_config(tmp_path)
