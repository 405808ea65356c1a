"""What the tests of cached training and of `unikd cache` share."""

import shutil
from pathlib import Path

import pytest

from support.cache_commands import PER_SHARD, cached_config, command, make_folder
from support.real_runs import save_teacher


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a teacher of the digits, to be read only."""
    return save_teacher(tmp_path_factory.mktemp("weights") / "teacher.pth")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose cache is built, in several shards."""
    config = cached_config(tmp_path_factory.mktemp("built"))
    make_folder(config, PER_SHARD)
    assert command("build", "--config", config).returncode == 0
    return config


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A configuration with a copy of that cache, to be damaged."""
    shutil.copytree(built.parent / "cache", tmp_path / "cache")
    return cached_config(tmp_path)
