"""Who decodes, and how that is told."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvidia.dali")

from support.dali_loaders import make
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.dali import _try_in_a_process
from unikd_fast.data.loader import _log_once
from unikd_fast.data.splits import DataSplits, ImageFiles


def test_says_who_makes_the_pixels(splits: DataSplits) -> None:
    import nvidia.dali

    said = make(splits).pixels
    assert said["decoder"].startswith(f"dali {nvidia.dali.__version__} cpu, nvimgcodec 0.")
    assert said["resize"] == f"torch {'.'.join(torch.__version__.split('.')[:2])}, bilinear, antialiased"
    assert "strong" not in said
    assert "torchvision" in make(splits, Augmentation(policy="rand")).pixels["strong"]


def test_auto_takes_dali_for_files_and_says_so_once(splits: DataSplits, caplog: pytest.LogCaptureFixture) -> None:
    _log_once.cache_clear()
    with caplog.at_level(logging.INFO, "unikd_fast"):
        loaders = [make(splits, kind="auto") for _ in range(2)]
    assert [type(one).__name__ for one in loaders] == ["DaliLoader"] * 2
    assert [record.message for record in caplog.records] == ["data.loader: image files are decoded by DALI"]


@pytest.mark.slow
def test_without_dali_auto_takes_pil_and_says_why(splits: DataSplits) -> None:
    program = """
import logging, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("nvidia.dali"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
logging.basicConfig(level=logging.INFO)
from pathlib import Path
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.sets.image_folder import load_image_folder
import sys; sys.path.insert(0, "tests")
from support.loaders import build_loader
shared = dict(augmentation=Augmentation(), seed=0, global_batch_size=8, device="cpu", workers=0)
splits = load_image_folder(Path(sys.argv[1]), 96)
print(type(build_loader(splits, **shared)).__name__)
build_loader(splits, kind="dali", **shared)
"""
    assert isinstance(splits.train, ImageFiles)
    root = Path(splits.train.paths[0]).parents[2]
    run = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True)
    assert run.stdout == "FolderLoader\n"
    assert run.stderr.count("decoded by PIL in worker processes (torchvision), because DALI does not work: Module") == 1
    assert "ValueError: build_loader: kind 'dali' does not work on this machine: ModuleNotFoundError" in run.stderr
    assert "dali12" in run.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to decode on")
@pytest.mark.parametrize("way", ["gpu", "gpu_parts"])
def test_a_trial_on_a_gpu_that_is_not_there_is_told(way: Any) -> None:
    problem = _try_in_a_process(way, 0)
    assert problem is not None
    assert "a trial ended with status 1: " in problem
    assert "CUDA" in problem
