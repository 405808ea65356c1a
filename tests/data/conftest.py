"""What the tests of Arrow files share, and those of the loader that decodes with DALI."""

from pathlib import Path

import datasets
import pytest

from support.dali_loaders import SIZE
from support.generated_images import write_jpegs
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of `datasets` that is the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    """JPEGs in a folder, 240 to train with and 61 to evaluate on."""
    return load_image_folder(write_jpegs(tmp_path_factory.mktemp("jpegs"), {"train": 240, "val": 61}), SIZE)
