"""What the tests of cached training share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from real_runs import process_group, save_teacher


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("weights") / "teacher.pth")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with process_group(tmp_path_factory.mktemp("group")):
        yield
