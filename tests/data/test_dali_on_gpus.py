"""DALI's graph for GPUs, run by the CPU, and on one where there is one."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("nvidia.dali")

from support.dali_loaders import CROPS, RESIZED, SHORT, SIZE, crops, levels, make
from unikd_fast.data.augmentation import Augmentation, view_parameters
from unikd_fast.data.dali import choose_decoding, view_pipeline
from unikd_fast.data.dali_views import ImageFeed, ReadViews, cut_view, read_image, windows_by
from unikd_fast.data.files import DecodeRequest
from unikd_fast.data.splits import DataSplits, ImageFiles
from unikd_fast.data.views import Windows


def encoded(splits: DataSplits, augmentation: Augmentation, second: Augmentation | None = None) -> list[ReadViews]:
    assert isinstance(splits.train, ImageFiles)
    ids = np.arange(40)
    views, other = (
        None if a is None else view_parameters(a, seed=3, epoch=0, sample_ids=ids, stream=stream)
        for stream, a in enumerate((augmentation, second))
    )
    request = DecodeRequest(splits.train.images(ids), splits.train.labels[ids], ids, views, other)
    with ThreadPoolExecutor(1) as threads:
        batch = ImageFeed(
            iter([request]), windows_by(Windows(SIZE, SHORT)), threads, ahead=1, for_pil=set()
        ).next_batch()
    assert batch is not None
    return list(batch.images.values())


@crops
@pytest.mark.parametrize("second", [None, CROPS[1]], ids=["one view", "two views"])
def test_the_gpu_graph_gives_the_same_views_on_the_cpu(
    splits: DataSplits, augmentation: Augmentation, second: Augmentation | None
) -> None:
    images = encoded(splits, augmentation, second)
    number = 1 if second is None else 2
    by_parts, whole = (
        [
            torch.from_dlpack(views.as_tensor()).permute(0, 3, 1, 2).clone()
            for views in view_pipeline(
                iter([images]).__next__,
                batch_size=40,
                views=number,
                image_size=SIZE,
                padded="pad" in (augmentation.crop, second and second.crop),
                by_parts=by_parts,
                device_id=None,
                threads=2,
                prefetch=1,
            ).run()
        ]
        for by_parts in (True, False)
    )
    assert len(by_parts) == number
    for view in range(number):
        assert torch.equal(by_parts[view], whole[view])
        for shown, image in zip(whole[view], images, strict=True):
            stored = read_whole(image)
            expected = cut_view(stored, image.windows[view], SIZE)
            difference = (shown.int() - expected.int()).abs()
            # Where a window is made smaller, DALI's filter repeats the border: at most an eighth of 255 a side.
            assert difference[:, 1:-1, 1:-1].max() <= 1
            assert difference.max() <= 1 or augmentation.crop == "resized"
            assert difference.max() <= 64


def read_whole(image: ReadViews) -> Tensor:
    if image.is_decoded:
        return torch.from_numpy(image.decoded_part().copy())
    pixels = np.asarray(Image.open(io.BytesIO(image.content.tobytes())).convert("RGB"))
    top, left, height, width = image.part
    return torch.from_numpy(pixels[top : top + height, left : left + width].copy())


def test_only_the_part_that_is_shown_is_decoded(splits: DataSplits) -> None:
    assert isinstance(splits.train, ImageFiles)
    images = encoded(splits, RESIZED)
    for stored, image in zip(splits.train.images(range(40)), images, strict=True):
        whole = read_image(stored)
        (window,) = image.windows
        assert window.box == (0, 0, *image.part[2:])
        assert image.part.height * image.part.width <= whole.height * whole.width
    assert sum(image.part.height for image in images) < 0.8 * sum(
        read_image(stored).height for stored in splits.train.images(range(40))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@crops
def test_on_a_gpu_views_are_near_the_pil_loaders(splits: DataSplits, augmentation: Augmentation) -> None:
    """Never run yet. The mean, since DALI's decoder on a GPU smooths chroma differently and borders differ."""
    assert choose_decoding(torch.device("cuda")) in ("gpu", "gpu_parts")
    ours = make(splits, augmentation, device="cuda", second=CROPS[1])
    theirs = make(splits, augmentation, kind="torchvision", workers=2, second=CROPS[1])
    for batch, other in zip(ours.train(1), theirs.train(1), strict=True):
        assert torch.equal(batch.sample_ids.cpu(), other.sample_ids)
        assert torch.equal(batch.labels.cpu(), other.labels)
        for images, others in ((batch.images, other.images), (batch.second, other.second)):
            assert images is not None and others is not None
            difference = (levels(images.cpu(), splits).float() - levels(others, splits).float()).abs()
            assert difference.mean(dim=(1, 2, 3)).max() <= 8
    first = [batch.images.cpu() for batch in ours.train(0)]
    assert all(torch.equal(a, b.images.cpu()) for a, b in zip(first, ours.train(0), strict=True))
