"""What the loader of image files says when something goes wrong."""

import gc
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from support.folder_images import RESIZED, SIZE, loader, write_images
from support.loaders import build_loader
from support.processes import finished
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits, ImageFiles, TensorImages
from unikd_fast.errors import LoaderError


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    return load_image_folder(write_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 11}), SIZE)


def test_an_iterator_that_lost_its_workers_says_so(splits: DataSplits) -> None:
    one = loader(splits)
    old = one.train(0)
    next(old)
    assert len(list(one.train(1))) == 3
    with pytest.raises(RuntimeError, match="ended when a newer call of train took over"):
        next(old)


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["loader.train(0)", "loader.evaluate('val')"], ids=["training", "evaluation"])
def test_a_killed_worker_ends_the_run_and_is_named(splits: DataSplits, batches: str) -> None:
    assert isinstance(splits.train, ImageFiles)
    program = f"""
import multiprocessing, os, signal, sys
from pathlib import Path
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.sets.image_folder import load_image_folder
import sys; sys.path.insert(0, "tests")
from support.loaders import build_loader

splits = load_image_folder(Path(sys.argv[1]), 16)
loader = build_loader(
    splits,
    augmentation=Augmentation(eval_resize=20),
    kind="torchvision",
    seed=0,
    global_batch_size=1,
    device="cpu",
    workers=2,
)
batches = {batches}
next(batches)
first, second = multiprocessing.active_children()
print("killed", first.pid, flush=True)
os.kill(first.pid, signal.SIGKILL)
print("batches", len(list(batches)))
"""
    # In a process of its own: torch raises from a signal handler, which may strike anywhere in the main thread, pytest
    # included.
    code, said, errors = finished(program, Path(splits.train.paths[0]).parents[2])
    assert said.startswith("killed ")
    assert "batches" not in said
    assert code == 1
    assert "DataLoader worker" in errors
    assert said.split()[1] in errors


def test_workers_that_died_between_epochs_are_told(splits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of training live on while the student is evaluated; the next epoch finds them gone."""

    def die(_: object) -> None:
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    one = loader(splits)
    list(one.train(0))
    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", die)
    with pytest.raises(LoaderError, match=r"process died \(RuntimeError: .*pid\(s\) 7.* data\.workers; .*/dev/shm"):
        one.train(1)


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["train", "evaluate"])
def test_workers_end_at_once_with_an_iterator_that_is_garbage(splits: DataSplits, batches: str) -> None:
    """As one is that an error's traceback holds, in a cycle that torch cannot end its workers out of."""
    others = set(multiprocessing.active_children())
    one = loader(splits, workers=2, global_batch_size=2)
    iterator = one.train(0) if batches == "train" else one.evaluate("val")
    next(iterator)
    cycle: list[object] = [one, iterator]
    cycle.append(cycle)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    del one, iterator, cycle
    start = time.monotonic()
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - start < 10  # torch waits for each of them for five seconds, twice


@pytest.mark.parametrize(
    "symptom",
    [
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        EOFError(),
        ConnectionResetError(104, "Connection reset by peer"),
        FileNotFoundError(2, "No such file or directory"),
    ],
    ids=lambda symptom: type(symptom).__name__,
)
def test_the_report_of_a_dead_worker_names_the_remedies(
    splits: DataSplits, monkeypatch: pytest.MonkeyPatch, symptom: Exception
) -> None:
    def die(*_: object) -> None:
        raise symptom

    monkeypatch.setattr("unikd_fast.data.workers._SIGNAL_WAIT_S", 0.0)
    monkeypatch.setattr("unikd_fast.data.files.Decoder.__getitem__", die)
    with pytest.raises(RuntimeError, match=rf"process died \({type(symptom).__name__}: .* data\.workers; .*/dev/shm"):
        next(loader(splits).train(0))


def test_torchs_word_on_a_dead_worker_is_waited_for(splits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise EOFError

    def signal_arrives(_: float) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("unikd_fast.data.files.Decoder.__getitem__", die)
    monkeypatch.setattr("time.sleep", signal_arrives)
    with pytest.raises(RuntimeError, match=r"process died \(RuntimeError: .*pid 7.* killed by signal.* data\.workers"):
        next(loader(splits).train(0))


def test_other_errors_of_the_device_pass_unchanged(splits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("unikd_fast.data.device.Normalise.__call__", die)
    with pytest.raises(RuntimeError, match=r"^CUDA error: out of memory$"):
        next(loader(splits).train(0))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n broken", b"text"], ids=["empty", "broken", "text"])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path: Path, content: bytes, workers: int) -> None:
    root = write_images(tmp_path, {"train": 3, "val": 3})
    (root / "train" / "class_1" / "bad.png").write_bytes(content)
    broken = load_image_folder(root, SIZE)
    with pytest.raises(ValueError, match=r"cannot decode .*class_1/bad\.png: .*repair the file or remove it"):
        list(loader(broken, global_batch_size=4, workers=workers).train(0))


def test_a_truncated_file_and_a_vanished_one_are_named(tmp_path: Path) -> None:
    root = write_images(tmp_path, {"train": 3, "val": 3})
    path = root / "train" / "class_1" / "001.png"
    path.write_bytes(path.read_bytes()[:200])
    broken = load_image_folder(root, SIZE)
    with pytest.raises(ValueError, match=r"cannot decode .*001\.png"):
        list(loader(broken, global_batch_size=3).train(0))
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot read .*001\.png: No such file"):
        list(loader(broken, global_batch_size=3).train(0))


def test_refuses_kinds_that_do_not_fit(splits: DataSplits) -> None:
    memory = TensorImages(torch.zeros(8, 3, SIZE, SIZE, dtype=torch.uint8), np.zeros(8, np.int64))
    tensors = DataSplits(memory, memory, memory, 3, None, splits.mean, splits.std, SIZE)
    shared = {"augmentation": RESIZED, "seed": 0, "global_batch_size": 8, "device": "cpu"}
    for data, kind, fitting in (
        (splits, "device", "torchvision"),
        (tensors, "torchvision", "device"),
        (tensors, "dali", "device"),
    ):
        with pytest.raises(ValueError, match=f"kind '{kind}' does not load .*use .*'{fitting}' or 'auto'"):
            build_loader(data, kind=kind, **shared)  # type: ignore[arg-type]
        assert build_loader(data, kind=fitting, **shared).steps_per_epoch >= 1  # type: ignore[arg-type]
    mixed = DataSplits(splits.train, memory, memory, 3, None, splits.mean, splits.std, SIZE)
    with pytest.raises(ValueError, match="must be image files, got TensorImages"):
        build_loader(mixed, kind="torchvision", **shared)  # type: ignore[arg-type]


def test_refuses_a_small_eval_resize_and_negative_workers(splits: DataSplits) -> None:
    with pytest.raises(ValueError, match="eval_resize 15 is below the image size 16"):
        loader(splits, Augmentation(eval_resize=15))
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        loader(splits, workers=-1)
