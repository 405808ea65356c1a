"""Scenes through DALI: the samples and boxes that Pillow's loader shows, and within a level its pixels."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nvidia.dali")

from support.scene_files import write_coco
from support.scene_loaders import assert_same, scene_loader
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.detection.loader import DetectionLoader
from unikd_fast.data.detection.scenes import DetectionSplits
from unikd_fast.data.detection.sets import open_scenes
from unikd_fast.data.detection.toy_scenes import load_toy_scenes
from unikd_fast.data.detection.views import DetectionSettings
from unikd_fast.data.settings import DataSettings
from unikd_fast.values import DetectionBatch


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> DetectionSplits:
    root = tmp_path_factory.mktemp("jpegs")
    write_coco(root, load_toy_scenes(40), kind="jpg")
    return open_scenes(DataSettings(name="coco", root=str(root)))


def make(splits: DetectionSplits, kind: str = "dali", **options: Any) -> DetectionLoader:
    sizes = DetectionSettings(short_sides=(48, 64, 200), long_side=230)
    return scene_loader(splits, "coco", **{"loader": kind, "workers": 0, "detection": sizes, **options})


def assert_close(batches: Iterable[DetectionBatch], expected: Iterable[DetectionBatch]) -> None:
    """The decoded pixels are the same. Resized, they may be rounded apart by a level, since torch's weights have 16
    bits and PIL's 22; in each of two directions, so seldom by two."""
    deviation = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    differences = []
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.sizes, other.sizes)
        assert torch.equal(batch.sample_ids, other.sample_ids)
        for part in ("boxes", "labels"):
            for own, others in zip(getattr(batch, part), getattr(other, part), strict=True):
                assert torch.equal(own, others)
        differences.append(((batch.images - other.images) * deviation * 255).round().abs().flatten())
    difference = torch.cat(differences)
    assert difference.max() <= 2
    assert (difference == 2).float().mean() <= 1e-5
    assert difference.mean() <= 0.02


@pytest.mark.parametrize("jitter", [(1.0, 1.0), (0.5, 2.0)], ids=["whole", "jittered"])
def test_agrees_with_the_pil_loader(splits: DetectionSplits, jitter: tuple[float, float]) -> None:
    sizes = DetectionSettings(short_sides=(48, 64, 200), long_side=230, scale_jitter=jitter)
    ours, theirs = (make(splits, kind, detection=sizes) for kind in ("dali", "torchvision"))
    assert_close(ours.train(2), theirs.train(2))
    assert_close(ours.train(1, 2, stream=1), theirs.train(1, 2, stream=1))
    assert_close(ours.evaluate("val"), theirs.evaluate("val"))


def test_colours_are_changed_by_the_same_numbers(splits: DetectionSplits) -> None:
    """What is a level apart before may be as many apart as the change of contrast makes of it."""
    augmentation = Augmentation(jitter=(0.2, 0.2, 0.2, 0.0))
    ours, theirs = (make(splits, kind, augmentation=augmentation) for kind in ("dali", "torchvision"))
    plain = list(make(splits).train(0))
    for batch, other, unchanged in zip(ours.train(0), theirs.train(0), plain, strict=True):
        assert (batch.images - other.images).abs().mean() < 0.1 * (batch.images - unchanged.images).abs().mean()


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_and_the_step_of_a_resumption_change_nothing(splits: DetectionSplits, threads: int) -> None:
    """Iterators leave each other alone."""
    through = list(make(splits).train(1))
    other = make(splits, dali_threads=threads)
    running = other.train(1)
    assert_same([next(running)], through[:1])
    assert_same(other.train(1, 2), through[2:])
    assert_same(other.evaluate("test"), make(splits).evaluate("test"))
    assert_same(running, through[1:])


def test_auto_takes_dali_for_files_alone(splits: DetectionSplits) -> None:
    assert_same(make(splits, "auto").train(0), make(splits).train(0))
    toy = open_scenes(DataSettings(name="toy_scenes", synthetic_samples=40))
    assert_same(scene_loader(toy, loader="auto").train(0), scene_loader(toy, loader="torchvision").train(0))
    for kind in ("dali", "device"):
        with pytest.raises(ValueError, match=f"kind '{kind}' does not load toy_scenes; use 'torchvision' or 'auto'"):
            scene_loader(toy, loader=kind)


def test_an_abandoned_iterator_ends_its_threads(splits: DetectionSplits, tmp_path: Path) -> None:
    import threading

    loader = make(splits)
    batches = loader.train(0)
    next(batches)
    assert any("unikd-dali-scenes" in thread.name for thread in threading.enumerate())
    del batches
    assert not any("unikd-dali-scenes" in thread.name for thread in threading.enumerate())
