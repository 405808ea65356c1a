"""What a loader copies to a device comes from pinned memory: the host does not wait, and the batches are the same."""

from itertools import islice
from typing import Any

import pytest
import torch

from support.dali_loaders import RESIZED
from support.fake_device import DEVICE, fake_device
from support.loaders import build_loader
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.sets.synthetic import load_synthetic
from unikd_fast.data.splits import DataSplits

WEAK = Augmentation(crop="pad", padding=2, flip_probability=0.5)
STRONG = Augmentation(crop="resized", flip_probability=0.5, policy="rand", jitter=(0.4, 0.4, 0.4, 0.1))


@pytest.fixture(scope="module")
def in_memory() -> DataSplits:
    return load_synthetic(100, 5, 24)


@pytest.mark.parametrize(
    ("first", "second"), [(WEAK, None), (STRONG, None), (WEAK, STRONG)], ids=["weak", "strong", "strong second"]
)
def test_data_in_memory(in_memory: DataSplits, first: Augmentation, second: Augmentation | None) -> None:
    compare(in_memory, first, second=second, kind="device", global_batch_size=20)


def test_images_that_dali_decodes_on_the_cpu(splits: DataSplits) -> None:
    pytest.importorskip("nvidia.dali")
    compare(splits, RESIZED, second=STRONG, kind="dali", global_batch_size=40)


def compare(splits: DataSplits, augmentation: Augmentation, **options: Any) -> None:
    """Batches on a device are those on the CPU, to the bit, and come without a wait."""
    options = {"augmentation": augmentation, "seed": 3, "accumulation_steps": 2, **options}
    wanted = list(build_loader(splits, device="cpu", **options).train(1))
    views = [part for batch in wanted for part in (batch.images, batch.second) if part is not None]
    assert len(wanted) > 2 and views[0].shape[-1] == splits.image_size
    with fake_device() as device:
        batches = build_loader(splits, device=DEVICE, **options).train(1)
        with device.watch():
            found = list(islice(batches, len(wanted)))
        assert device.waits == []
        for batch, other in zip(found, wanted, strict=True):
            for part, expected in zip(batch, other, strict=True):
                assert (part is None) == (expected is None)
                assert part is None or (part.device == DEVICE and torch.equal(part.cpu(), expected))
