"""Finished runs to export."""

import shutil
from pathlib import Path

import pytest

from support.exported_runs import ALONE_TRAINED, SHORT, Runs, short, trained


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two finished runs, to be read only."""
    folder = tmp_path_factory.mktemp("runs")
    averaged = short(folder, "averaged", distill={"head_steps": None})
    alone = short(folder, "alone", **ALONE_TRAINED, train={**SHORT["train"], "ema_decay": None})
    return Runs(trained(averaged), trained(alone))


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Path:
    """A copy of the run "averaged", to be damaged."""
    return Path(shutil.copytree(runs.averaged, tmp_path / "copy"))
